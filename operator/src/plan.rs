//! What a run asks the cluster for: the method that Auto chooses, the GpuClass, pods, GPUs and memory.
//!
//! The arithmetic is the planner's; this module brings it the cluster's classes and nodes.

use k8s_openapi::api::core::v1::Node;
use kube::ResourceExt;
use tunesmith_crds::{
    FineTuneJobSpec, GpuClass, GpuClassSpec, Method, RunSpec,
    fine_tune_job::{MethodName, Plan},
    run::PreflightReport,
};
use tunesmith_planner::{Device, Estimate, NoPlacement, Offer, Request, Workload, estimate, format_bytes, place};

use crate::nodes::largest_node;

/// Host memory of a GPU pod besides the model's file, for each GPU: runtime, staging buffers, data.
const HOST_BYTES_PER_GPU: u64 = 4 << 30;
/// Memory of a pod while the model's shape is unknown.
const UNKNOWN_MEMORY: &str = "2Gi";
/// What a training may write to its working folder besides four copies of the model.
const WORK_BYTES: u64 = 16 << 30;

/// What the cluster offers.
#[derive(Clone, Debug, Default)]
pub struct Offers {
    /// Its GpuClasses.
    pub classes: Vec<GpuClass>,
    /// Its nodes; empty if no class needs to know them.
    pub nodes: Vec<Node>,
}

/// What a run asks for.
#[derive(Clone, Debug, PartialEq)]
pub struct Planned {
    /// For the status.
    pub plan: Plan,
    /// The method with its options.
    pub method: Method,
    /// The class's spec.
    pub class: GpuClassSpec,
    /// Memory of each pod, as a quantity.
    pub memory: String,
    /// Most that each pod may write to its working folder, as a quantity.
    pub work_limit: String,
}

impl Planned {
    /// The run's spec with all that the plan decides of the result.
    pub fn resolve(&self, spec: RunSpec) -> RunSpec {
        let gpus = self.plan.pods * self.plan.gpus_per_pod;
        spec.resolved(gpus.max(self.plan.pods), device_of(&self.class) == Device::Gpu)
    }
}

/// Plans a run of `spec`. Without `preflight` the model's shape is unknown, so that memory is not looked at.
/// `fixed` is the method of a run that has begun.
///
/// # Errors
/// If no GpuClass will do: why, and what to change.
pub fn plan(
    spec: &FineTuneJobSpec,
    offers: &Offers,
    preflight: Option<&PreflightReport>,
    fixed: Option<MethodName>,
) -> Result<Planned, NoPlacement> {
    let stored_as = preflight.and_then(|report| report.model.stored_as.as_ref());
    let methods = fixed.map_or_else(|| spec.methods(stored_as), |method| vec![method]);
    let estimate_for = |method: MethodName, device: Device| -> Option<Estimate> {
        let (report, method) = (preflight?, spec.method_as(method, stored_as)?);
        Some(estimate(
            &Workload {
                model: &report.model,
                method: &method,
                training: &spec.training,
                lora_parameters: report.lora_parameters,
            },
            device,
        ))
    };
    let offered: Vec<Offer> = offers.classes.iter().map(|class| offer(class, &offers.nodes)).collect();
    let memory = |method, device, gpus| Some(estimate_for(method, device)?.bytes_per_device(gpus));
    let global_batch = spec.training.global_batch_size;
    let request = Request { methods: &methods, resources: &spec.resources, global_batch, memory: &memory };
    let placement = place(&request, &offered)?;

    let no_class = || NoPlacement::NoClass(placement.method);
    let class = offers.classes.iter().find(|class| class.name_any() == placement.class).ok_or_else(no_class)?;
    let method = spec.method_as(placement.method, stored_as).ok_or_else(no_class)?;
    let device = device_of(&class.spec);
    let gpus = placement.pods * placement.gpus_per_pod;
    let estimated = estimate_for(placement.method, device);
    let total = estimated.map(|estimate| estimate.bytes_per_device(gpus) * u64::from(gpus.max(1)));
    let memory = spec.resources.memory.clone().unwrap_or_else(|| match (estimated, preflight, device) {
        (Some(estimate), _, Device::Cpu) => format_bytes(estimate.bytes_per_device(1)),
        (_, Some(report), Device::Gpu) => {
            format_bytes(model_bytes(report) + HOST_BYTES_PER_GPU * u64::from(placement.gpus_per_pod))
        }
        _ => UNKNOWN_MEMORY.into(),
    });
    Ok(Planned {
        plan: Plan {
            method: Some(placement.method),
            gpu_class: placement.class,
            pods: placement.pods,
            gpus_per_pod: placement.gpus_per_pod,
            estimated_memory: total.map(format_bytes),
            trainable_parameters: estimated.map(|estimate| estimate.trainable_parameters),
            adapter_size: estimated.map(|estimate| format_bytes(estimate.published_bytes)),
        },
        method,
        class: class.spec.clone(),
        memory,
        work_limit: format_bytes(WORK_BYTES + 4 * preflight.map_or(0, model_bytes)),
    })
}

/// Whether planning with this class needs to know the cluster's nodes.
pub fn needs_nodes(class: &GpuClassSpec) -> bool {
    class.resource_name.is_some() && class.gpus_per_node.is_none() && class.methods.iter().any(|offer| offer.gpus > 1)
}

fn offer<'a>(class: &'a GpuClass, nodes: &[Node]) -> Offer<'a> {
    let name = class.metadata.name.as_deref().unwrap_or_default();
    Offer { name, spec: &class.spec, largest_node: largest_node(&class.spec, nodes) }
}

fn device_of(class: &GpuClassSpec) -> Device {
    if class.resource_name.is_some() { Device::Gpu } else { Device::Cpu }
}

fn model_bytes(report: &PreflightReport) -> u64 {
    report.model.parameters * report.model.bytes_per_parameter
}
