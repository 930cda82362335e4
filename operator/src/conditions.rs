//! Keeps conditions by the rules of Kubernetes: one of each type, each with the generation that it is about, and a
//! transition time that changes only with the verdict.

use k8s_openapi::{
    apimachinery::pkg::apis::meta::v1::{Condition, ObjectMeta, Time},
    jiff::Timestamp,
};
use tunesmith_crds::conditions::{READY, RECONCILING, STALLED};

/// Longest message that the API server takes.
const MAX_MESSAGE: usize = 32_768;

/// Whether a condition holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It holds.
    True,
    /// It doesn't.
    False,
    /// Not known yet.
    Unknown,
}

impl Verdict {
    /// True or False.
    pub fn of(holds: bool) -> Self {
        if holds { Self::True } else { Self::False }
    }

    fn text(self) -> &'static str {
        match self {
            Self::True => "True",
            Self::False => "False",
            Self::Unknown => "Unknown",
        }
    }
}

/// The conditions of an object, in the making.
pub struct Conditions<'a> {
    previous: &'a [Condition],
    generation: Option<i64>,
    now: Timestamp,
    conditions: Vec<Condition>,
}

impl<'a> Conditions<'a> {
    /// Starts from the conditions that the object has.
    pub fn new(previous: &'a [Condition], generation: Option<i64>, now: Timestamp) -> Self {
        Self { previous, generation, now, conditions: Vec::new() }
    }

    /// Sets the condition of this type.
    pub fn set(&mut self, type_: &str, verdict: Verdict, reason: &str, message: &str) {
        let status = verdict.text();
        let unchanged = self.previous.iter().find(|before| before.type_ == type_ && before.status == status);
        self.conditions.push(Condition {
            type_: type_.into(),
            status: status.into(),
            reason: reason.into(),
            message: message.chars().take(MAX_MESSAGE / 4).collect(),
            observed_generation: self.generation,
            last_transition_time: unchanged.map_or(Time(self.now), |before| before.last_transition_time.clone()),
        });
    }

    /// All that were set.
    pub fn into_vec(self) -> Vec<Condition> {
        self.conditions
    }
}

/// Conditions of an object that can't be served: it waits for its user. They are the same each time, so that writing them
/// again changes nothing and wakes nobody.
pub fn stalled(object: &ObjectMeta, reason: &str, message: &str) -> Vec<Condition> {
    let since = object.creation_timestamp.as_ref().map_or(Timestamp::UNIX_EPOCH, |time| time.0);
    let mut conditions = Conditions::new(&[], object.generation, since);
    for (type_, verdict) in [(READY, Verdict::False), (RECONCILING, Verdict::False), (STALLED, Verdict::True)] {
        conditions.set(type_, verdict, reason, message);
    }
    conditions.into_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_object_that_can_not_be_served_is_told_so_in_the_same_words_each_time() {
        let created = Time(Timestamp::from_second(60).unwrap());
        let object =
            ObjectMeta { generation: Some(3), creation_timestamp: Some(created.clone()), ..Default::default() };
        let conditions = stalled(&object, "Unreadable", "bad URI");
        let told: Vec<_> = conditions.iter().map(|c| (c.type_.as_str(), c.status.as_str())).collect();
        assert_eq!(told, [("Ready", "False"), ("Reconciling", "False"), ("Stalled", "True")]);
        assert!(conditions.iter().all(|c| c.last_transition_time == created && c.observed_generation == Some(3)));
    }

    #[test]
    fn the_transition_time_changes_only_with_the_verdict() {
        let (first, second) = (Timestamp::UNIX_EPOCH, Timestamp::from_second(60).unwrap());
        let mut conditions = Conditions::new(&[], Some(1), first);
        conditions.set("Ready", Verdict::False, "Training", "step 1");
        let before = conditions.into_vec();

        let mut conditions = Conditions::new(&before, Some(2), second);
        conditions.set("Ready", Verdict::False, "Publishing", "writes");
        let same = conditions.into_vec();
        assert_eq!(same[0].last_transition_time.0, first);
        assert_eq!((same[0].reason.as_str(), same[0].observed_generation), ("Publishing", Some(2)));

        let mut conditions = Conditions::new(&same, Some(2), second);
        conditions.set("Ready", Verdict::True, "Published", "");
        assert_eq!(conditions.into_vec()[0].last_transition_time.0, second);
    }
}
