//! Streams, memory and failures of the emulated device: what a host may not do shows.

use tunesmith_kernels::{
    Address, Device, Error, Grid, Memory, Stream,
    emulator::{Emulator, POISON},
    kernels::AddParts,
};

/// Floats of each buffer.
const WIDTH: usize = 64;
const BYTES: usize = 4 * WIDTH;
const SEEDS: std::ops::Range<u64> = 0..8;

fn upload(device: &Emulator, on: Stream, to: Address, values: &[f32; WIDTH]) {
    // SAFETY: each test keeps its values until it has synchronized.
    unsafe { device.upload(on, to, values.as_ptr().cast(), BYTES) }.unwrap();
}

/// Asks for `to` += `parts`.
fn add(device: &Emulator, to: Address, parts: Address) -> Result<(), Error> {
    let launch = AddParts { to, parts, count: 1, width: WIDTH as i32 };
    // SAFETY: the checked build looks at every access.
    unsafe { device.launch(Stream::Main, &launch, Grid::row(1, 256)) }
}

fn download(device: &Emulator, from: Address) -> Result<[f32; WIDTH], Error> {
    let mut values = [0.0; WIDTH];
    // SAFETY: the array outlives the synchronization.
    unsafe { device.download(Stream::Main, from, values.as_mut_ptr().cast(), BYTES) }?;
    device.synchronize()?;
    Ok(values)
}

/// What a launch makes of a copy beside it, which it waits for or not.
fn copied_beside(seed: u64, waits: bool) -> Result<[f32; WIDTH], Error> {
    let device = Emulator::checked(seed);
    let (sum, parts) = (device.allocate(BYTES, "sum")?, device.allocate(BYTES, "parts")?);
    let (zeros, ones) = ([0.0; WIDTH], [1.0; WIDTH]);
    upload(&device, Stream::Main, sum, &zeros);
    upload(&device, Stream::Copies, parts, &ones);
    if waits {
        device.wait(Stream::Main, Stream::Copies)?;
    }
    add(&device, sum, parts)?;
    download(&device, sum)
}

#[test]
fn a_launch_that_does_not_wait_for_a_copy_reads_what_nobody_has_written() {
    for seed in SEEDS {
        assert_eq!(copied_beside(seed, true), Ok([1.0; WIDTH]), "seed {seed}");
    }
    let mut found =
        SEEDS.filter(|seed| copied_beside(*seed, false).is_err_and(|error| error.to_string().contains("of parts")));
    assert_eq!(found.next(), Some(0), "the copy is as late as it can be");
    assert!(found.next().is_some(), "and in some other order");
}

/// What a launch makes of a buffer that is filled again beside it.
fn filled_again_beside(seed: u64, waits: bool) -> [f32; WIDTH] {
    let device = Emulator::checked(seed);
    let (sum, parts) = (device.allocate(BYTES, "sum").unwrap(), device.allocate(BYTES, "parts").unwrap());
    let (zeros, ones, twos) = ([0.0; WIDTH], [1.0; WIDTH], [2.0; WIDTH]);
    upload(&device, Stream::Main, sum, &zeros);
    upload(&device, Stream::Main, parts, &ones);
    device.synchronize().unwrap();
    add(&device, sum, parts).unwrap();
    if waits {
        device.wait(Stream::Copies, Stream::Main).unwrap();
    }
    upload(&device, Stream::Copies, parts, &twos);
    download(&device, sum).unwrap()
}

#[test]
fn a_copy_that_does_not_wait_for_a_launch_overtakes_it() {
    for seed in SEEDS {
        assert_eq!(filled_again_beside(seed, true), [1.0; WIDTH], "seed {seed}");
    }
    let mut overtaken = SEEDS.filter(|seed| filled_again_beside(*seed, false) == [2.0; WIDTH]);
    assert_eq!(overtaken.next(), Some(1), "the copy is as early as it can be");
    assert!(overtaken.next().is_some(), "and in some other order");
}

#[test]
fn a_host_that_waits_for_one_stream_has_not_waited_for_the_other() {
    let device = Emulator::checked(0);
    let data = device.allocate(BYTES, "data").unwrap();
    let (ones, mut read) = ([1.0; WIDTH], [0u8; BYTES]);
    upload(&device, Stream::Main, data, &ones);
    // SAFETY: the array outlives the synchronization.
    unsafe { device.download(Stream::Main, data, read.as_mut_ptr(), BYTES) }.unwrap();
    device.finish(Stream::Copies).unwrap();
    assert_eq!(read, [POISON; BYTES]);
    device.finish(Stream::Main).unwrap();
    assert_eq!(read[..4], 1f32.to_ne_bytes());
}

#[test]
fn memory_is_counted_and_ends() {
    let device = Emulator::checked(0).with_memory(1000);
    let first = device.allocate(600, "weights").unwrap();
    let Err(Error::Memory { bytes: 500, name, memory }) = device.allocate(500, "gradients") else {
        panic!("there is room");
    };
    assert_eq!((name.as_str(), memory), ("gradients", Memory { total: 1000, free: 400, used: 600, peak: 600 }));
    // The device goes on.
    device.release(first).unwrap();
    device.allocate(500, "gradients").unwrap();
    assert_eq!(device.memory().unwrap(), Memory { total: 1000, free: 500, used: 500, peak: 600 });
}

#[test]
fn memory_is_released_in_the_order_of_the_stream() {
    for (is_released_first, works) in [(false, true), (true, false)] {
        let device = Emulator::checked(0);
        let (sum, parts) = (device.allocate(BYTES, "sum").unwrap(), device.allocate(BYTES, "parts").unwrap());
        let ones = [1.0; WIDTH];
        for at in [sum, parts] {
            upload(&device, Stream::Main, at, &ones);
        }
        if is_released_first {
            device.release(parts).unwrap();
        }
        add(&device, sum, parts).unwrap();
        if !is_released_first {
            device.release(parts).unwrap();
        }
        assert_eq!(download(&device, sum).is_ok(), works);
    }
}

#[test]
fn a_copy_outside_of_a_buffer_is_refused_and_a_device_that_failed_stays_so() {
    let device = Emulator::checked(0);
    let data = device.allocate(BYTES, "data").unwrap();
    let ones = [1.0; WIDTH];
    upload(&device, Stream::Main, data.plus(4), &ones);
    let error = device.synchronize().unwrap_err();
    assert!(error.to_string().contains("outside of a buffer"), "{error}");
    let later = [
        device.synchronize(),
        device.allocate(BYTES, "more").map(|_| ()),
        device.memory().map(|_| ()),
        add(&device, data, data),
        device.release(data),
    ];
    assert_eq!(later, [(); 5].map(|()| Err(error.clone())));
}

#[test]
fn memory_of_the_host_is_copied_from() {
    let device = Emulator::checked(0);
    let (at, staging) = (device.allocate(4, "data").unwrap(), device.allocate_host(4).unwrap());
    let mut read = [0u8; 4];
    // SAFETY: both outlive the synchronization, and the memory is given back as it was taken.
    unsafe {
        staging.cast::<[u8; 4]>().write([1, 2, 3, 4]);
        device.upload(Stream::Copies, at, staging, 4).unwrap();
        device.wait(Stream::Main, Stream::Copies).unwrap();
        device.download(Stream::Main, at, read.as_mut_ptr(), 4).unwrap();
        device.synchronize().unwrap();
        device.release_host(staging, 4);
    }
    assert_eq!(read, [1, 2, 3, 4]);
}
