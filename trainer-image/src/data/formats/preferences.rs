//! Rows that teach which of several answers is better, and other rows that are no examples to imitate: each kind is
//! refused by name, as learning them word for word would turn their meaning around.

use serde_json::Value;

use super::{Columns, is_given, shorten};

/// Columns that hold an answer to be learned.
const ANSWERS: [&str; 6] = ["messages", "conversations", "completion", "output", "response", "prompt"];
/// Columns that grade an answer.
const GRADES: [&str; 8] = ["score", "scores", "reward", "rewards", "rank", "ranks", "ranking", "preference"];
/// Columns that weigh a whole row.
const WEIGHTS: [&str; 3] = ["weight", "sample_weight", "loss_weight"];
/// Columns of other media than text.
pub(super) const MEDIA: [&str; 6] = ["image", "images", "video", "videos", "audio", "audios"];

/// Columns that mark an answer.
const MARKS: [&str; 4] = ["label", "labels", "kto_tag", "completions"];
/// Columns of pairs: a better answer and a worse one.
const PAIRS: [&str; 8] = [
    "chosen",
    "rejected",
    "chosen_response",
    "rejected_response",
    "response_chosen",
    "response_rejected",
    "chosen_messages",
    "rejected_messages",
];

/// Every column that tells such a row.
pub(super) fn columns() -> impl Iterator<Item = &'static str> {
    MARKS.into_iter().chain(PAIRS).chain(GRADES).chain(WEIGHTS).chain(MEDIA)
}

/// Refuses a row whose columns have a meaning that is not carried out; `is_mapped` tells the columns that the user has
/// given another name on purpose.
///
/// # Errors
/// It is of such a kind; the message says which, and how its good answers can be used.
pub(super) fn refuse(columns: &Columns, is_mapped: impl Fn(&str) -> bool) -> Result<(), String> {
    let given = |name: &str| columns.get(name).filter(|value| is_given(value));
    for name in PAIRS {
        if given(name).is_some() && !PAIRS.into_iter().any(|name| name.contains("chosen") && is_mapped(name)) {
            return Err(format!(
                "{name}: pairs of a chosen and a rejected answer (DPO) are not supported; to learn the chosen answers \
                 alone, name their column: dataset.columns {{completion: chosen}}, or {{messages: chosen}} if it holds turns; \
                 or remove the column {name} if another one holds them"
            ));
        }
    }
    kto(columns)?;
    if given("labels").is_some() && given("completions").is_some() {
        return Err("labels: steps that are graded one by one (stepwise supervision) are not supported".into());
    }
    let has_answer = ANSWERS.iter().any(|name| given(name).is_some());
    for name in GRADES.iter().filter(|_| has_answer) {
        if given(name).is_some_and(|value| number(value).is_some() || value.is_array() || value.is_object()) {
            return Err(format!(
                "{name}: graded answers (rewards, rankings) are not supported; keep the rows that are to be learned, and \
                 remove the column {name}"
            ));
        }
    }
    for name in WEIGHTS {
        if let Some(weight) = given(name).filter(|weight| number(weight) != Some(1.0)) {
            return Err(format!(
                "{name} is {weight}: weights of rows are not supported; remove or repeat rows instead"
            ));
        }
    }
    match MEDIA.iter().find(|name| given(name).is_some()) {
        Some(name) => Err(format!("{name}: only text is trained; remove the column {name} if the text stands alone")),
        None => Ok(()),
    }
}

/// A number, or its text: CSV has no others.
fn number(value: &Value) -> Option<f64> {
    value.as_f64().or_else(|| value.as_str()?.trim().parse().ok())
}

/// Refuses an answer that is marked good or bad (Kahneman-Tversky Optimization).
fn kto(columns: &Columns) -> Result<(), String> {
    let is_mark = |value: &Value| match value {
        Value::Bool(_) => true,
        Value::Number(_) | Value::String(_) => {
            let text = value.as_str().map_or_else(|| value.to_string(), str::to_lowercase);
            ["0", "1", "true", "false"].contains(&text.as_str())
                && ANSWERS.iter().any(|name| columns.contains_key(*name))
        }
        _ => false,
    };
    let label = columns.get("label").filter(|value| is_mark(value)).map(|value| ("label", value));
    let tag = columns.get("kto_tag").filter(|value| is_given(value)).map(|value| ("kto_tag", value));
    match label.or(tag) {
        Some((name, value)) => Err(format!(
            "{name} is {value}: answers that are marked good or bad (KTO) are not supported; keep the rows whose {name} is \
             true, and remove the column {name}"
        )),
        None => Ok(()),
    }
}

/// Says of which kind data is that has none of the formats' columns.
pub(super) fn other_kind(columns: &Columns) -> Option<String> {
    let given = |name: &str| columns.get(name).is_some_and(is_given);
    let is_rows = |value: &Value| value.as_array().is_some_and(|rows| rows.first().is_some_and(Value::is_object));
    if given("prompt") && given("completions") {
        Some("; several completions of a prompt (rankings, stepwise supervision) are not supported".into())
    } else if given("prompt") && columns.iter().all(|(name, value)| name == "prompt" || !is_given(value)) {
        Some("; prompts alone (for reinforcement learning) are not supported, as there is no answer to learn".into())
    } else {
        let (name, _) = columns.iter().find(|(_, value)| is_rows(value))?;
        let name = shorten(name);
        Some(format!(
            "; if {name} holds turns, set {{messages: {name}}}; if it holds the rows, write them as a list of their own"
        ))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn refused(columns: Value, mapped: &[&str]) -> Result<(), String> {
        refuse(columns.as_object().unwrap(), |name| mapped.contains(&name))
    }

    #[test]
    fn each_kind_of_preference_data_is_named() {
        for (columns, expected) in [
            (
                json!({"prompt": "a", "chosen": "b", "rejected": "c"}),
                "chosen: pairs of a chosen and a rejected answer (DPO)",
            ),
            (json!({"messages": [{}], "rejected": [{}]}), "rejected: pairs"),
            (json!({"messages": [{}], "rejected_response": "c"}), "rejected_response: pairs"),
            (json!({"prompt": "a", "completion": "b", "label": false}), "label is false: answers that are marked"),
            (json!({"prompt": "a", "completion": "b", "label": true}), "keep the rows whose label is true"),
            (json!({"prompt": "a", "completion": "b", "label": 0}), "label is 0: answers that are marked"),
            (json!({"prompt": "a", "completion": "b", "label": "False"}), "KTO"),
            (json!({"messages": [{}], "kto_tag": true}), "kto_tag is true: answers that are marked"),
            (json!({"prompt": "a", "completions": ["b"], "labels": [true]}), "stepwise supervision"),
            (json!({"prompt": "a", "completion": "b", "reward": 0.5}), "reward: graded answers"),
            (json!({"prompt": "a", "responses": ["b", "c"], "scores": [1, 2]}), "scores: graded answers"),
            (json!({"prompt": "a", "completion": "b", "score": "0.5"}), "score: graded answers"),
            (json!({"messages": [{}], "weight": 0.5}), "weight is 0.5: weights of rows"),
            (json!({"messages": [{}], "images": ["a.png"]}), "images: only text is trained"),
        ] {
            let error = refused(columns, &[]).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn empty_columns_and_labels_of_other_kinds_refuse_no_row() {
        for columns in [
            json!({"messages": [{}], "chosen": null, "rejected": [], "label": null, "images": [], "weight": 1}),
            json!({"text": "a", "label": 1, "weight": "1.0"}),
            json!({"text": "a", "label": "sport", "score": 3}),
            json!({"prompt": "a", "completion": "b", "label": 7}),
        ] {
            refused(columns, &[]).unwrap();
        }
        let mapped = json!({"prompt": "a", "completion": "b", "rejected": "c"});
        refused(mapped, &["chosen"]).unwrap();
    }
}
