//! The status of an AdapterVersion.

use k8s_openapi::{apimachinery::pkg::apis::meta::v1::Time, jiff::Timestamp};
use tunesmith_crds::{
    AdapterVersion, AdapterVersionPhase as Phase, AdapterVersionStatus,
    conditions::{READY, RECONCILING, STALLED, reason},
};

use super::decide::State;
use crate::conditions::{Conditions, Verdict};

/// The version's status now.
pub fn status(version: &AdapterVersion, state: &State, now: Timestamp) -> AdapterVersionStatus {
    let previous = version.status.clone().unwrap_or_default();
    let mut conditions = Conditions::new(&previous.conditions, version.metadata.generation, now);
    let mut set = |type_, holds| conditions.set(type_, Verdict::of(holds), state.reason, &state.message);
    set(READY, state.phase == Phase::Available);
    set(RECONCILING, !state.is_verdict());
    set(STALLED, state.is_bad());
    let compared = state.is_verdict() && state.reason != reason::GATE_FAILED;
    let verified = state.verified.map(Time).or(previous.verified_time).or(Some(Time(now))).filter(|_| compared);
    let inspected_time = state.inspected.map(Time).or(previous.inspected_time);
    AdapterVersionStatus {
        phase: Some(state.phase),
        observed_generation: version.metadata.generation,
        conditions: conditions.into_vec(),
        verified_time: verified,
        inspected_time,
    }
}
