//! Which nodes a GpuClass means, by the rules of a pod's required node affinity.

use std::sync::Arc;

use k8s_openapi::api::core::v1::{Node, NodeSelectorRequirement, NodeSelectorTerm};
use kube::ResourceExt;
use tunesmith_crds::GpuClassSpec;

/// The most GPUs of a class that one of `nodes` has.
pub fn largest_node(class: &GpuClassSpec, nodes: &[Arc<Node>]) -> Option<u32> {
    let resource = class.resource_name.as_deref()?;
    let allocatable = |node: &Node| -> Option<u32> {
        let quantity = node.status.as_ref()?.allocatable.as_ref()?.get(resource)?;
        quantity.0.parse().ok().filter(|gpus| *gpus > 0)
    };
    nodes
        .iter()
        .map(|node| &**node)
        .filter(|node| matches(&class.node_selector_terms, node))
        .filter_map(allocatable)
        .max()
}

/// Whether a node satisfies one of the terms; every node does if there are none.
fn matches(terms: &[NodeSelectorTerm], node: &Node) -> bool {
    terms.is_empty() || terms.iter().any(|term| matches_term(term, node))
}

fn matches_term(term: &NodeSelectorTerm, node: &Node) -> bool {
    let labels = term.match_expressions.as_deref().unwrap_or_default();
    let fields = term.match_fields.as_deref().unwrap_or_default();
    let name = node.name_any();
    // A term without requirements matches no node.
    !(labels.is_empty() && fields.is_empty())
        && labels.iter().all(|r| matches_requirement(r, node.labels().get(&r.key).map(String::as_str)))
        && fields.iter().all(|r| r.key == "metadata.name" && matches_requirement(r, Some(&name)))
}

fn matches_requirement(requirement: &NodeSelectorRequirement, value: Option<&str>) -> bool {
    let values = requirement.values.as_deref().unwrap_or_default();
    let is_listed = value.is_some_and(|value| values.iter().any(|listed| listed == value));
    let compare = |order: fn(&i64, &i64) -> bool| {
        let bound = values.first().and_then(|bound| bound.parse().ok());
        let value = value.and_then(|value| value.parse().ok());
        value.zip(bound).is_some_and(|(value, bound)| order(&value, &bound))
    };
    match requirement.operator.as_str() {
        "In" => is_listed,
        "NotIn" => !is_listed,
        "Exists" => value.is_some(),
        "DoesNotExist" => value.is_none(),
        "Gt" => compare(i64::gt),
        "Lt" => compare(i64::lt),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn node(name: &str, gpus: &str, labels: Value) -> Arc<Node> {
        let node = serde_json::from_value(json!({
            "metadata": {"name": name, "labels": labels},
            "status": {"allocatable": {"nvidia.com/gpu": gpus}},
        }));
        Arc::new(node.unwrap())
    }

    fn class(terms: Value) -> GpuClassSpec {
        serde_json::from_value(json!({
            "resourceName": "nvidia.com/gpu", "memory": "80Gi", "methods": [], "nodeSelectorTerms": terms,
        }))
        .unwrap()
    }

    fn expression(key: &str, operator: &str, values: &[&str]) -> Value {
        json!([{"matchExpressions": [{"key": key, "operator": operator, "values": values}]}])
    }

    #[test]
    fn the_largest_matching_node_counts_and_no_other() {
        let nodes = [
            node("a", "4", json!({"nvidia.com/gpu.memory": "81920"})),
            node("b", "8", json!({"nvidia.com/gpu.memory": "24564"})),
            node("c", "2", json!({"nvidia.com/gpu.memory": "81559"})),
        ];
        let large = class(expression("nvidia.com/gpu.memory", "Gt", &["80000"]));
        assert_eq!(largest_node(&large, &nodes), Some(4));
        assert_eq!(largest_node(&class(json!([])), &nodes), Some(8));
        assert_eq!(largest_node(&class(expression("nvidia.com/gpu.memory", "Gt", &["90000"])), &nodes), None);
    }

    #[test]
    fn operators_mean_what_they_mean_to_the_scheduler() {
        let node = node("n", "1", json!({"zone": "a"}));
        let holds = |terms: Value| largest_node(&class(terms), std::slice::from_ref(&node)).is_some();
        assert!(holds(expression("zone", "In", &["a", "b"])));
        assert!(!holds(expression("zone", "NotIn", &["a"])));
        assert!(holds(expression("rack", "NotIn", &["a"])));
        assert!(holds(expression("zone", "Exists", &[])));
        assert!(holds(expression("rack", "DoesNotExist", &[])));
        assert!(!holds(expression("zone", "Lt", &["1"])));
        assert!(holds(json!([{"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["n"]}]}])));
        assert!(!holds(json!([{}])));
    }
}
