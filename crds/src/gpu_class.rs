//! [`GpuClass`]: a kind of GPU that a cluster admin offers for training.

use k8s_openapi::api::core::v1::{NodeSelectorTerm, Toleration};
use kube::{CustomResource, KubeSchema};
use serde::{Deserialize, Serialize};

use crate::{
    fine_tune_job::MethodName,
    schema::{QUANTITY, is_name, is_quantity, rule},
};

/// Offers a kind of GPU (or plain CPUs) for training.
#[derive(CustomResource, KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "tunesmith.dev",
    version = "v1alpha1",
    kind = "GpuClass",
    plural = "gpuclasses",
    cel,
    doc = "GpuClass offers a kind of GPU, or plain CPUs, for training.",
    derive = "PartialEq",
    shortname = "gc",
    category = "tunesmith",
    printcolumn(name = "Resource", type_ = "string", json_path = ".spec.resourceName"),
    printcolumn(name = "Memory", type_ = "string", json_path = ".spec.memory"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[x_kube(
    validation = Rule::new("has(self.resourceName) == has(self.memory)")
        .message("a class of GPUs needs both resourceName and memory; a class of CPUs has neither"),
    validation = Rule::new("self.methods.all(m, m.gpus > 0) || !has(self.resourceName)")
        .message("a class with a resourceName gives every method at least 1 GPU").field_path(".methods"),
    validation = Rule::new("self.methods.all(m, m.gpus == 0) || has(self.resourceName)")
        .message("a class without a resourceName has no GPUs: gpus must be 0").field_path(".methods")
)]
#[serde(rename_all = "camelCase")]
pub struct GpuClassSpec {
    /// Extended resource by which pods request a GPU, such as nvidia.com/gpu. Default: none, which makes this a class
    /// of plain CPUs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253), extend("x-kubernetes-validations" = rule(
        r"self.matches(r'^[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$')",
        "must be the name of an extended resource such as nvidia.com/gpu",
    )))]
    pub resource_name: Option<String>,
    /// Memory of one GPU, as a Kubernetes quantity such as 80Gi. The planner compares the estimate of a run with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 32), regex(pattern = QUANTITY), extend("x-kubernetes-validations" = is_quantity("80Gi")))]
    pub memory: Option<String>,
    /// GPUs of one node, which bounds the GPUs of one pod. Default: the most that a matching node of the cluster has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 64))]
    pub gpus_per_node: Option<u32>,
    /// The methods that may use this class, and how many GPUs a run of each method gets.
    #[schemars(length(min = 1, max = 3), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["method"]))]
    pub methods: Vec<MethodOffer>,
    /// Nodes that have such a GPU. A node must match one of these terms, as in a pod's required node affinity. Use
    /// the labels of GPU Feature Discovery, such as nvidia.com/gpu.memory (in MiB). Default: any node.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub node_selector_terms: Vec<NodeSelectorTerm>,
    /// Tolerations of the training pods, for nodes with taints.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32))]
    pub tolerations: Vec<Toleration>,
    /// RuntimeClass of the training pods, such as nvidia. Default: that of the cluster.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253), extend("x-kubernetes-validations" = is_name()))]
    pub runtime_class_name: Option<String>,
}

/// A method that may use a class.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MethodOffer {
    /// The method: Full, LoRA or QLoRA.
    #[x_kube(validation = Rule::new("self != 'Auto'").message("must be Full, LoRA or QLoRA"))]
    pub method: MethodName,
    /// GPUs of one run, over all its pods. 0 in a class of CPUs.
    #[schemars(range(min = 0, max = 1024))]
    pub gpus: u32,
}

impl GpuClassSpec {
    /// GPUs that a run of `method` gets, or None if the class doesn't offer it.
    pub fn gpus_for(&self, method: MethodName) -> Option<u32> {
        self.methods.iter().find(|offer| offer.method == method).map(|offer| offer.gpus)
    }
}
