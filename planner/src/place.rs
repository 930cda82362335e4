//! Which GpuClass a run gets, and how many pods with how many GPUs.

use tunesmith_crds::{
    GpuClassSpec,
    fine_tune_job::{MethodName, Resources},
};

use crate::{
    estimate::Device,
    quantity::{format_bytes, parse_bytes},
};

/// A GpuClass of the cluster.
#[derive(Clone, Debug)]
pub struct Offer<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its spec.
    pub spec: &'a GpuClassSpec,
    /// The most GPUs of this class that a node of the cluster has, if any has one.
    pub largest_node: Option<u32>,
    /// Whether the trainer's image computes on its devices.
    pub usable: bool,
}

/// What a run asks for. `memory` tells the bytes that each of so many GPUs (or the one CPU pod) needs for a method, or
/// None while the model's shape is unknown.
pub struct Request<'a> {
    /// Methods that will do, the preferred one first.
    pub methods: &'a [MethodName],
    /// What the user fixed.
    pub resources: &'a Resources,
    /// Rows of a step over all devices, if the user fixed them.
    pub global_batch: Option<u64>,
    /// Memory that each device needs.
    pub memory: &'a dyn Fn(MethodName, Device, u32) -> Option<u64>,
}

/// Where a run goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// The method that is used.
    pub method: MethodName,
    /// Name of the GpuClass.
    pub class: String,
    /// Training pods.
    pub pods: u32,
    /// GPUs of each.
    pub gpus_per_pod: u32,
}

/// Why a run goes nowhere.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoPlacement {
    /// The job names a class that is not there.
    #[error("GpuClass {0} does not exist: create it, or name another in spec.resources.gpuClass")]
    NoSuchClass(String),
    /// The job names a class that its method may not use.
    #[error("GpuClass {class} does not offer method {method:?}: name another in spec.resources.gpuClass")]
    NotOffered {
        /// The class.
        class: String,
        /// The method.
        method: MethodName,
    },
    /// No class offers the method.
    #[error("no GpuClass offers method {0:?}: create one, or ask for another method")]
    NoClass(MethodName),
    /// Classes offer it, but all are too small.
    #[error(
        "method {method:?} needs about {needed} on each GPU, and {class}, the largest GpuClass that offers it, has {has}: \
         set training.gradientCheckpointing, a smaller batch or maxLength, or another method"
    )]
    TooLarge {
        /// The method.
        method: MethodName,
        /// What a device needs.
        needed: String,
        /// The largest class.
        class: String,
        /// What it has.
        has: String,
    },
    /// Classes offer it, but the trainer's image computes on none of their devices.
    #[error(
        "GpuClass {class} has GPUs, and this cluster's trainer image computes on CPUs alone (chart value trainer.devices): \
         name a class without GPUs that offers method {method:?}, such as cpu, in spec.resources.gpuClass"
    )]
    NoDevice {
        /// The class.
        class: String,
        /// The method.
        method: MethodName,
    },
    /// The job asks for more GPUs than the class gives.
    #[error(
        "spec.resources asks for {pods} pods of {gpus_per_pod} GPUs, and GpuClass {class} gives method {method:?} {gpus} in \
         all: leave out pods and gpusPerPod, or ask for fewer"
    )]
    TooManyGpus {
        /// The class.
        class: String,
        /// The method.
        method: MethodName,
        /// Pods that are asked for.
        pods: u32,
        /// GPUs of each.
        gpus_per_pod: u32,
        /// GPUs that the class gives.
        gpus: u32,
    },
    /// The devices can't share a step's rows.
    #[error(
        "training.globalBatchSize {rows} can't be divided among the {devices} devices of class {class}: set a multiple of \
         {devices}"
    )]
    Indivisible {
        /// Rows of a step.
        rows: u64,
        /// Devices of all pods.
        devices: u32,
        /// Their class.
        class: String,
    },
}

/// Finds the smallest class that offers one of the methods and fits. GPUs go before CPUs, then an earlier method before
/// a later one. A class that the user named is taken at its word, whatever the estimate says.
///
/// # Errors
/// If no class will do: why, and what to change.
pub fn place(request: &Request, offers: &[Offer]) -> Result<Placement, NoPlacement> {
    let placement = place_anywhere(request, offers)?;
    let total = placement.pods.saturating_mul(placement.gpus_per_pod);
    let class = offers.iter().find(|offer| offer.name == placement.class);
    let gpus = class.and_then(|offer| offer.spec.gpus_for(placement.method)).unwrap_or(0);
    if total > gpus {
        let Placement { method, class, pods, gpus_per_pod } = placement;
        return Err(NoPlacement::TooManyGpus { class, method, pods, gpus_per_pod, gpus });
    }
    let devices = total.max(placement.pods);
    match request.global_batch {
        Some(rows) if !rows.is_multiple_of(u64::from(devices.max(1))) => {
            Err(NoPlacement::Indivisible { rows, devices, class: placement.class })
        }
        _ => Ok(placement),
    }
}

fn place_anywhere(request: &Request, offers: &[Offer]) -> Result<Placement, NoPlacement> {
    let mut candidates: Vec<Candidate> = request
        .methods
        .iter()
        .enumerate()
        .flat_map(|(preference, &method)| {
            offers.iter().filter_map(move |offer| Candidate::new(preference, method, offer))
        })
        .collect();
    if let Some(class) = &request.resources.gpu_class {
        if !offers.iter().any(|offer| offer.name == class) {
            return Err(NoPlacement::NoSuchClass(class.clone()));
        }
        let method = request.methods.first().copied().unwrap_or_default();
        // In the order of preference; where none fits, the one that needs least.
        candidates.retain(|candidate| candidate.offer.name == class);
        let fitting = candidates.iter().find(|candidate| candidate.needs(request) <= candidate.memory());
        let named = fitting.or_else(|| candidates.iter().min_by_key(|candidate| candidate.needs(request)));
        return match named {
            None => Err(NoPlacement::NotOffered { class: class.clone(), method }),
            Some(named) if !named.offer.usable => {
                Err(NoPlacement::NoDevice { class: class.clone(), method: named.method })
            }
            Some(named) => Ok(named.placement(request.resources)),
        };
    }
    let unusable = candidates.iter().find(|candidate| !candidate.offer.usable);
    let unusable = unusable.map(|candidate| (candidate.offer.name.to_owned(), candidate.method));
    candidates.retain(|candidate| candidate.offer.usable);
    candidates.sort_by_key(|c| (c.device() == Device::Cpu, c.preference, c.memory(), c.offer.name));
    if let Some(fitting) = candidates.iter().find(|candidate| candidate.needs(request) <= candidate.memory()) {
        return Ok(fitting.placement(request.resources));
    }
    let method = request.methods.first().copied().unwrap_or_default();
    let largest = candidates.iter().filter(|c| c.method == method).max_by_key(|c| c.memory());
    let largest = largest.ok_or(match unusable {
        Some((class, method)) => NoPlacement::NoDevice { class, method },
        None => NoPlacement::NoClass(method),
    })?;
    Err(NoPlacement::TooLarge {
        method,
        needed: format_bytes(largest.needs(request)),
        class: largest.offer.name.into(),
        has: format_bytes(largest.memory()),
    })
}

/// A class that offers one of the wanted methods.
struct Candidate<'a> {
    preference: usize,
    method: MethodName,
    offer: &'a Offer<'a>,
    gpus: u32,
}

impl<'a> Candidate<'a> {
    fn new(preference: usize, method: MethodName, offer: &'a Offer<'a>) -> Option<Self> {
        Some(Self { preference, method, offer, gpus: offer.spec.gpus_for(method)? })
    }

    fn device(&self) -> Device {
        if self.offer.spec.resource_name.is_some() { Device::Gpu } else { Device::Cpu }
    }

    /// Memory of one device; a CPU pod takes what it asks for.
    fn memory(&self) -> u64 {
        self.offer.spec.memory.as_deref().and_then(parse_bytes).unwrap_or(u64::MAX)
    }

    /// Memory that one device needs; 0 while that is unknown.
    fn needs(&self, request: &Request) -> u64 {
        let placement = self.placement(request.resources);
        (request.memory)(self.method, self.device(), placement.pods * placement.gpus_per_pod).unwrap_or(0)
    }

    fn placement(&self, fixed: &Resources) -> Placement {
        let (pods, gpus_per_pod) = layout(self.gpus, self.offer, fixed);
        Placement { method: self.method, class: self.offer.name.into(), pods, gpus_per_pod }
    }
}

/// Pods and GPUs of each: one pod where a node has enough GPUs, else a pod for each GPU. A class without GPUs, and a
/// cluster whose nodes are not there yet, get one pod.
fn layout(gpus: u32, offer: &Offer, fixed: &Resources) -> (u32, u32) {
    let node = offer.spec.gpus_per_node.or(offer.largest_node).unwrap_or(gpus);
    let (pods, gpus_per_pod) = if gpus <= node.max(1) { (1, gpus) } else { (gpus, 1) };
    match (fixed.pods, fixed.gpus_per_pod) {
        (None, None) => (pods, gpus_per_pod),
        (Some(pods), None) => (pods, gpus.div_ceil(pods)),
        (None, Some(each)) => (gpus.div_ceil(each.max(1)).max(1), each),
        (Some(pods), Some(each)) => (pods, each),
    }
}

#[cfg(test)]
mod tests {
    use tunesmith_crds::gpu_class::MethodOffer;

    use super::*;

    fn class(resource: Option<&str>, memory: Option<&str>, methods: &[(MethodName, u32)]) -> GpuClassSpec {
        GpuClassSpec {
            resource_name: resource.map(Into::into),
            memory: memory.map(Into::into),
            methods: methods.iter().map(|&(method, gpus)| MethodOffer { method, gpus }).collect(),
            ..GpuClassSpec::default()
        }
    }

    fn shipped() -> [(&'static str, GpuClassSpec); 3] {
        use MethodName::{Full, LoRA, QLoRA};
        [
            ("a100-80gb", class(Some("nvidia.com/gpu"), Some("80Gi"), &[(Full, 4)])),
            ("consumer-24gb", class(Some("nvidia.com/gpu"), Some("24Gi"), &[(LoRA, 1), (QLoRA, 1)])),
            ("cpu", class(None, None, &[(LoRA, 0)])),
        ]
    }

    fn offers<'a>(classes: &'a [(&'static str, GpuClassSpec)], largest_node: Option<u32>) -> Vec<Offer<'a>> {
        classes.iter().map(|(name, spec)| Offer { name, spec, largest_node, usable: true }).collect()
    }

    fn place_on(
        largest_node: Option<u32>,
        methods: &[MethodName],
        resources: &Resources,
        memory: &dyn Fn(MethodName, Device, u32) -> Option<u64>,
    ) -> Result<Placement, NoPlacement> {
        let classes = shipped();
        let offers = offers(&classes, largest_node);
        place(&Request { methods, resources, global_batch: None, memory }, &offers)
    }

    fn placed(class: &str, method: MethodName, pods: u32, gpus_per_pod: u32) -> Result<Placement, NoPlacement> {
        Ok(Placement { method, class: class.into(), pods, gpus_per_pod })
    }

    const UNKNOWN: &dyn Fn(MethodName, Device, u32) -> Option<u64> = &|_, _, _| None;

    #[test]
    fn full_asks_for_four_a100s_in_one_pod_where_a_node_has_four() {
        let full = |node| place_on(node, &[MethodName::Full], &Resources::default(), UNKNOWN);
        assert_eq!(full(Some(4)), placed("a100-80gb", MethodName::Full, 1, 4));
        assert_eq!(full(Some(8)), placed("a100-80gb", MethodName::Full, 1, 4));
        assert_eq!(full(None), placed("a100-80gb", MethodName::Full, 1, 4));
        assert_eq!(full(Some(2)), placed("a100-80gb", MethodName::Full, 4, 1));
    }

    #[test]
    fn lora_gets_one_consumer_gpu_and_auto_falls_back_to_qlora_when_it_does_not_fit() {
        let (none, auto) = (Resources::default(), [MethodName::LoRA, MethodName::QLoRA]);
        assert_eq!(place_on(None, &auto, &none, UNKNOWN), placed("consumer-24gb", MethodName::LoRA, 1, 1));
        let large = |method, _, _| Some(if method == MethodName::LoRA { 30 << 30 } else { 12 << 30 });
        assert_eq!(place_on(None, &auto, &none, &large), placed("consumer-24gb", MethodName::QLoRA, 1, 1));
        // LoRA alone is left with the CPU.
        assert_eq!(place_on(None, &auto[..1], &none, &large), placed("cpu", MethodName::LoRA, 1, 0));
    }

    #[test]
    fn what_fits_nowhere_is_refused_with_the_numbers() {
        let error = place_on(None, &[MethodName::Full], &Resources::default(), &|_, _, _| Some(100 << 30)).unwrap_err();
        assert_eq!(
            error.to_string(),
            "method Full needs about 100Gi on each GPU, and a100-80gb, the largest GpuClass that offers it, has 80Gi: \
             set training.gradientCheckpointing, a smaller batch or maxLength, or another method"
        );
    }

    #[test]
    fn devices_that_can_not_share_the_rows_of_a_step_are_refused() {
        let (classes, methods, resources) = (shipped(), [MethodName::Full], Resources::default());
        let offers = offers(&classes, Some(4));
        let of = |rows| {
            let request =
                Request { methods: &methods, resources: &resources, global_batch: Some(rows), memory: UNKNOWN };
            place(&request, &offers)
        };
        assert_eq!(of(8), placed("a100-80gb", MethodName::Full, 1, 4));
        assert_eq!(
            of(6).unwrap_err().to_string(),
            "training.globalBatchSize 6 can't be divided among the 4 devices of class a100-80gb: set a multiple of 4"
        );
    }

    #[test]
    fn auto_on_a_named_class_takes_the_method_that_fits_it() {
        let auto = [MethodName::LoRA, MethodName::QLoRA];
        let consumer = Resources { gpu_class: Some("consumer-24gb".into()), ..Resources::default() };
        let needs = |lora: u64, qlora: u64| {
            move |method, _: Device, _: u32| Some(if method == MethodName::LoRA { lora << 30 } else { qlora << 30 })
        };
        let qlora = placed("consumer-24gb", MethodName::QLoRA, 1, 1);
        assert_eq!(place_on(None, &auto, &consumer, &needs(30, 12)), qlora);
        assert_eq!(place_on(None, &auto, &consumer, &needs(50, 40)), qlora, "none fits: the smaller one");
        let lora = placed("consumer-24gb", MethodName::LoRA, 1, 1);
        assert_eq!(place_on(None, &auto, &consumer, &needs(20, 12)), lora);
        assert_eq!(place_on(None, &auto[..1], &consumer, &needs(30, 12)), lora, "the user said LoRA");
    }

    #[test]
    fn a_class_whose_devices_the_trainer_can_not_use_is_passed_over() {
        let classes = shipped();
        let on_cpus = |methods: &[MethodName], class: Option<&str>| {
            let mut offers = offers(&classes, None);
            offers.iter_mut().for_each(|offer| offer.usable = offer.name == "cpu");
            let resources = Resources { gpu_class: class.map(Into::into), ..Resources::default() };
            place(&Request { methods, resources: &resources, global_batch: None, memory: UNKNOWN }, &offers)
        };
        assert_eq!(on_cpus(&[MethodName::LoRA], None), placed("cpu", MethodName::LoRA, 1, 0));
        for (method, class) in [(MethodName::Full, None), (MethodName::LoRA, Some("consumer-24gb"))] {
            let error = on_cpus(&[method], class).unwrap_err().to_string();
            assert!(error.contains("trainer.devices"), "{error}");
        }
    }

    #[test]
    fn more_gpus_than_the_class_gives_are_refused() {
        let eight = Resources { gpus_per_pod: Some(8), ..Resources::default() };
        let error = place_on(None, &[MethodName::LoRA], &eight, UNKNOWN).unwrap_err().to_string();
        assert!(error.contains("asks for 1 pods of 8 GPUs, and GpuClass consumer-24gb gives method LoRA 1"), "{error}");
        let on_cpu = Resources { gpu_class: Some("cpu".into()), gpus_per_pod: Some(1), ..Resources::default() };
        assert!(place_on(None, &[MethodName::LoRA], &on_cpu, UNKNOWN).is_err());
    }

    #[test]
    fn the_user_has_the_last_word_on_class_and_layout() {
        let named = |class: &str, pods, gpus_per_pod| Resources {
            gpu_class: Some(class.into()),
            pods,
            gpus_per_pod,
            ..Resources::default()
        };
        let lora = &[MethodName::LoRA];
        assert_eq!(place_on(None, lora, &named("cpu", None, None), UNKNOWN), placed("cpu", MethodName::LoRA, 1, 0));
        let full = place_on(Some(8), &[MethodName::Full], &named("a100-80gb", Some(2), None), UNKNOWN);
        assert_eq!(full, placed("a100-80gb", MethodName::Full, 2, 2));
        assert_eq!(
            place_on(None, lora, &named("h100", None, None), UNKNOWN),
            Err(NoPlacement::NoSuchClass("h100".into()))
        );
        assert_eq!(
            place_on(None, lora, &named("a100-80gb", None, None), UNKNOWN),
            Err(NoPlacement::NotOffered { class: "a100-80gb".into(), method: MethodName::LoRA })
        );
    }
}
