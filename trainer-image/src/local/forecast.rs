//! What a job would take: memory and file size by the planner, and the GpuClass that the chart's defaults give it in a cluster.

use std::collections::BTreeMap;

use serde::Deserialize;
use tunesmith_crds::{FineTuneJobSpec, GpuClassSpec, Method, fine_tune_job::MethodName, run::PreflightReport};
use tunesmith_planner::{Device, Estimate, NoPlacement, Offer, Request, Workload, estimate, format_bytes, place};

/// The chart's values as far as plans depend on them.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Values {
    trainer: Trainer,
    gpu_classes: BTreeMap<String, GpuClassSpec>,
}

#[derive(Deserialize)]
struct Trainer {
    /// What the image computes on.
    devices: Vec<String>,
}

impl Values {
    /// The chart's defaults.
    fn defaults() -> Self {
        serde_saphyr::from_str(include_str!("../../../charts/tunesmith/values.yaml")).expect("a test reads them")
    }
}

/// Lines for whoever wants to know before the job is applied.
pub(super) fn lines(job: &FineTuneJobSpec, method: &Method, report: &PreflightReport) -> [String; 2] {
    let here = estimated(job, method, report, Device::Cpu);
    let [memory, published] = [here.bytes_per_device(1), here.published_bytes].map(format_bytes);
    [
        format!(
            "here it takes about {memory} of memory; {} parameters are trained, {published} are published",
            here.trainable_parameters
        ),
        in_cluster(job, report, &Values::defaults()),
    ]
}

fn estimated(job: &FineTuneJobSpec, method: &Method, report: &PreflightReport, device: Device) -> Estimate {
    let lora_parameters = report.lora_parameters;
    estimate(&Workload { model: &report.model, method, training: &job.training, lora_parameters }, device)
}

/// Where a cluster with these values would run it, if it has nodes for each class.
fn in_cluster(job: &FineTuneJobSpec, report: &PreflightReport, values: &Values) -> String {
    let stored_as = report.model.stored_as.as_ref();
    let has_cuda = values.trainer.devices.iter().any(|device| device == "cuda");
    let is_usable = |class: &GpuClassSpec| has_cuda || class.resource_name.is_none();
    let offer = |(name, spec)| Offer { name, spec, largest_node: None, usable: is_usable(spec) };
    let classes = values.gpu_classes.iter().map(|(name, spec)| (name.as_str(), spec));
    let offers: Vec<Offer> = classes.map(offer).collect();
    let memory = |method: MethodName, device: Device, gpus: u32| {
        Some(estimated(job, &job.method_as(method, stored_as)?, report, device).bytes_per_device(gpus))
    };
    let request = Request {
        methods: &job.methods(stored_as),
        resources: &job.resources,
        global_batch: job.training.global_batch_size,
        memory: &memory,
    };
    match place(&request, &offers) {
        Ok(placement) => {
            let (class, method) = (&placement.class, placement.method);
            let pods = if placement.pods == 1 { "1 pod".to_owned() } else { format!("{} pods", placement.pods) };
            let gpus = match placement.gpus_per_pod {
                0 => "without a GPU".to_owned(),
                1 => "with 1 GPU each".to_owned(),
                gpus => format!("with {gpus} GPUs each"),
            };
            format!("with the chart's defaults a cluster runs it as {method:?} on GpuClass {class}: {pods} {gpus}")
        }
        Err(NoPlacement::NoSuchClass(class)) => {
            format!("GpuClass {class} is none of the chart's defaults: whether it fits, the cluster will say")
        }
        Err(problem) => format!("with the chart's defaults a cluster refuses it: {problem}"),
    }
}
