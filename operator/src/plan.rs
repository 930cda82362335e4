//! What a run asks the cluster for: the method that Auto chooses, the GpuClass, pods, GPUs and memory.
//!
//! The arithmetic is the planner's; this module brings it the cluster's classes and nodes.

use std::sync::Arc;

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

/// Bytes a second at which a checkpoint reaches the store, at the least.
const STORE_RATE: u64 = 50_000_000;
/// Bytes of a trained parameter in a checkpoint: its value and both moments of AdamW, in f32.
const CHECKPOINT_BYTES: u64 = 12;
/// Bounds of the time for a checkpoint, in seconds.
const GRACE_SECONDS: (u64, u64) = (120, 3600);

/// What the cluster offers.
#[derive(Clone, Debug, Default)]
pub struct Offers {
    /// Its GpuClasses.
    pub classes: Vec<Arc<GpuClass>>,
    /// Its nodes.
    pub nodes: Vec<Arc<Node>>,
    /// What the trainer's image can compute on.
    pub devices: Devices,
}

/// What the trainer's image can compute on, besides CPUs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Devices {
    /// NVIDIA GPUs.
    pub cuda: bool,
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
    /// Time for a checkpoint after SIGTERM, in seconds.
    pub grace_seconds: i64,
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
    let offered: Vec<Offer> = offers.classes.iter().map(|class| offer(class, offers)).collect();
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
        grace_seconds: grace_seconds(estimated.map_or(0, |estimate| estimate.trainable_parameters)),
        class: class.spec.clone(),
        memory,
        work_limit: format_bytes(WORK_BYTES + 4 * preflight.map_or(0, model_bytes)),
    })
}

/// Time to write a checkpoint of so many trained parameters.
fn grace_seconds(trainable_parameters: u64) -> i64 {
    let (least, most) = GRACE_SECONDS;
    let seconds = trainable_parameters.saturating_mul(CHECKPOINT_BYTES) / STORE_RATE;
    i64::try_from(least.saturating_add(seconds).min(most)).unwrap_or(i64::MAX)
}

fn offer<'a>(class: &'a GpuClass, offers: &Offers) -> Offer<'a> {
    let name = class.metadata.name.as_deref().unwrap_or_default();
    let usable = offers.devices.cuda || device_of(&class.spec) == Device::Cpu;
    Offer { name, spec: &class.spec, largest_node: largest_node(&class.spec, &offers.nodes), usable }
}

fn device_of(class: &GpuClassSpec) -> Device {
    if class.resource_name.is_some() { Device::Gpu } else { Device::Cpu }
}

fn model_bytes(report: &PreflightReport) -> u64 {
    report.model.parameters * report.model.bytes_per_parameter
}
