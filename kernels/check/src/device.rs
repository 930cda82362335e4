//! What any device does: streams that wait for each other, memory that is counted, failures that stay.

use tunesmith_kernels::{Grid, Stream, kernels::AddParts};

use crate::bench::Bench;

listed![a_copy_beside_kernels_is_waited_for, memory_is_counted, a_device_that_has_failed_stays_so];

/// Floats of a buffer: 4 MB, so that a copy takes a while.
const WIDTH: usize = 1 << 20;

/// `to` += `parts`.
fn add(bench: &Bench, launch: AddParts) {
    // SAFETY: both have so many floats.
    unsafe { bench.device().launch(Stream::Main, &launch, Grid::row(WIDTH as u32 / 256, 256)) }.unwrap();
}

fn a_copy_beside_kernels_is_waited_for() {
    const ROUNDS: usize = 3;
    for seed in [0, 1] {
        let bench = Bench::new(seed);
        let device = bench.device();
        let sum = bench.put("sum", &vec![0f32; WIDTH]);
        let parts = bench.empty::<f32>("parts", WIDTH);
        let bytes = 4 * WIDTH;
        let staging = device.allocate_host(bytes).unwrap();
        // Other streams find memory once the main one has it.
        device.wait(Stream::Copies, Stream::Main).unwrap();
        for round in 1..=ROUNDS {
            // SAFETY: the host has waited for the copy before.
            unsafe { std::slice::from_raw_parts_mut(staging.cast::<f32>(), WIDTH) }.fill(round as f32);
            // SAFETY: the staging memory stays until the host has waited for the copy.
            unsafe { device.upload(Stream::Copies, parts.at, staging, bytes) }.unwrap();
            device.wait(Stream::Main, Stream::Copies).unwrap();
            add(&bench, AddParts { to: sum.at, parts: parts.at, count: 1, width: WIDTH as i32 });
            // The next copy comes after the kernel that reads this one.
            device.wait(Stream::Copies, Stream::Main).unwrap();
            device.finish(Stream::Copies).unwrap();
        }
        assert!(sum.get().iter().all(|x| *x == 6.0), "seed {seed}");
        // SAFETY: nobody uses it any more.
        unsafe { device.release_host(staging, bytes) };
    }
}

fn memory_is_counted() {
    let bench = Bench::new(0);
    let device = bench.device();
    let before = device.memory().unwrap();
    let at = device.allocate(1 << 20, "more").unwrap();
    let with = device.memory().unwrap();
    assert_eq!((with.used, with.peak), (before.used + (1 << 20), before.peak.max(before.used + (1 << 20))));
    assert!(with.free < with.total && with.total == before.total);
    device.release(at).unwrap();
    assert_eq!(device.memory().unwrap().used, before.used);
}

fn a_device_that_has_failed_stays_so() {
    let bench = Bench::new(0);
    let device = bench.device();
    let sum = bench.put("sum", &[0f32; 8]).at;
    let launch = AddParts { to: sum, parts: sum, count: 1, width: 8 };
    // SAFETY: no device has blocks of 2,000 threads.
    let launched = unsafe { device.launch(Stream::Main, &launch, Grid::row(1, 2000)) };
    let failure = launched.and_then(|()| device.synchronize()).unwrap_err();
    let later = [device.synchronize(), device.allocate(8, "more").map(|_| ()), device.memory().map(|_| ())];
    assert_eq!(later, [(); 3].map(|()| Err(failure.clone())));
}
