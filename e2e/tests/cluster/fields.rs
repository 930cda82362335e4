//! What the API server takes of each field, one value at a time. The trainer's own tests hold Rust against the same table.

use anyhow::Result;
use kube::{
    Api,
    api::{ApiResource, DynamicObject, PostParams},
};
use serde::Deserialize;
use serde_json::{Value, json};
use tunesmith_crds::FineTuneJob;

use crate::tenant::Tenant;

#[derive(Deserialize)]
struct Case {
    field: String,
    value: Value,
    accepted: bool,
}

#[tokio::test(flavor = "multi_thread")]
async fn each_field_is_judged_as_the_table_says() -> Result<()> {
    let team = Tenant::new("fields").await?;
    let cases: Vec<Case> = serde_json::from_str(include_str!("../../../crds/tests/fields.json"))?;
    let params = PostParams { dry_run: true, ..Default::default() };
    let kind = ApiResource::erase::<FineTuneJob>(&());
    let api = Api::<DynamicObject>::namespaced_with(team.client.clone(), &team.namespace, &kind);
    let mut wrong = Vec::new();
    for Case { field, value, accepted } in cases {
        let mut job = team.job("judged", json!({"output": {"secretRef": null}}));
        let (parent, key) = field.rsplit_once('/').expect("a pointer");
        job.pointer_mut(parent).expect("a field")[key] = value.clone();
        let verdict = api.create(&params, &serde_json::from_value(job)?).await;
        if verdict.is_ok() != accepted {
            wrong.push(format!("{field}: {value}: {:?}", verdict.err()));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}
