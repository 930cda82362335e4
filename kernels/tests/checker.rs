//! The checker on kernels with one defect each, and on sound ones.

use tunesmith_kernels::{
    Address, Argument, Device, Error, Grid, Kernel, Launch, Stream,
    builds::Builds,
    emulated,
    emulator::{Emulator, POISON},
};

/// Numbers that the kernels work on: one a thread.
const COUNT: usize = 64;

/// A kernel of `defects/defects.cu`.
struct Defect {
    builds: Builds,
    name: &'static str,
    data: Address,
    count: i32,
}

impl Launch for Defect {
    fn kernel(&self) -> Kernel {
        Kernel { name: self.name, file: "defects", emulated: self.builds }
    }

    fn arguments(&self) -> Vec<(*const std::ffi::c_void, usize)> {
        fn argument<T: Argument>(value: &T) -> (*const std::ffi::c_void, usize) {
            ((value as *const T).cast(), size_of::<T>())
        }
        vec![argument(&self.data), argument(&self.count)]
    }
}

/// Runs a kernel on one block of 64 threads, or more.
fn run(device: &Emulator, name: &'static str, builds: Builds, blocks: u32) -> Result<Vec<f32>, Error> {
    let numbers: Vec<f32> = (0..COUNT as u16).map(f32::from).collect();
    let mut result = vec![0.0; COUNT];
    let data = device.allocate(4 * COUNT, "data")?;
    // SAFETY: both vectors outlive the synchronization, and the memory is as large.
    unsafe {
        device.upload(Stream::Main, data, numbers.as_ptr().cast(), 4 * COUNT)?;
        let defect = Defect { builds, name, data, count: COUNT as i32 };
        device.launch(Stream::Main, &defect, Grid::row(blocks, 64).with_shared(512))?;
        device.download(Stream::Main, data, result.as_mut_ptr().cast(), 4 * COUNT)?;
    }
    device.synchronize()?;
    Ok(result)
}

macro_rules! judged {
    ($($name:ident: $words:literal,)*) => {
        [$((stringify!($name), emulated!($name), $words)),*]
    };
}

#[test]
fn each_defect_is_found_and_named_whatever_the_order_and_sound_kernels_pass() {
    let kernels = judged! {
        sound_exchange: "",
        sound_half_masks: "",
        sound_within_a_warp: "",
        sound_copy: "",
        sound_early_return: "",
        divergent_barrier: "divergent barrier",
        barrier_after_return: "divergent barrier",
        barrier_of_half_a_warp: "deadlock",
        shuffle_in_a_branch: "deadlock",
        shuffle_in_two_branches: "divergent warp",
        shuffle_outside_its_mask: "does not name the calling lane",
        shuffle_from_outside_its_mask: "does not name",
        write_behind_the_end: "'data'",
        write_before_the_beginning: "'data'",
        read_behind_the_end: "'data'",
        shared_memory_behind_the_end: "of 512 bytes of shared memory",
        index_behind_an_array: "out of an array's bounds",
        misaligned_vector: "16-byte aligned",
        unwritten_shared_memory: "which nobody has written",
        race_within_a_warp: "race",
        race_past_a_warp_barrier: "race",
        race_of_a_write_and_a_read_before: "race",
        race_of_two_writes: "race",
        race_in_device_memory: "race",
        race_between_blocks: "another block",
        copy_without_a_wait: "has not been waited for",
        copy_without_a_barrier: "race",
        copy_waited_for_too_early: "has not been waited for",
        copy_that_is_never_waited_for: "returns before it has waited",
        copy_from_behind_the_end: "'data'",
        copy_to_a_misaligned_target: "16-byte aligned",
        matrix_behind_the_end: "of 512 bytes of shared memory",
        stack_overflow: "bytes of stack",
        integer_overflow: "integer overflow",
        wait_for_another_block: "spins",
    };
    let mut wrong = Vec::new();
    for (name, builds, words) in kernels {
        let blocks = if name == "race_between_blocks" { 2 } else { 1 };
        for seed in 0..6 {
            let said = run(&Emulator::checked(seed), name, builds, blocks).err().map(|error| error.to_string());
            let is_right = match &said {
                None => words.is_empty(),
                Some(said) => !words.is_empty() && said.contains(words) && said.starts_with(name),
            };
            if !is_right {
                wrong.push(format!("{name}, seed {seed}: expected {words:?}, said {said:?}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn a_message_names_the_line() {
    let builds = emulated!(race_within_a_warp);
    let said = run(&Emulator::checked(0), "race_within_a_warp", builds, 1).unwrap_err().to_string();
    assert!(said.contains("defects.cu:"), "{said}");
}

#[test]
fn both_builds_compute_the_same() {
    let builds = emulated!(sound_exchange);
    let expected: Vec<f32> = (0..64u16).rev().map(f32::from).collect();
    for device in [Emulator::fast(), Emulator::checked(0), Emulator::checked(5)] {
        assert_eq!(run(&device, "sound_exchange", builds, 1).unwrap(), expected);
    }
}

#[test]
fn a_host_that_does_not_synchronize_reads_poison_and_one_that_writes_too_early_is_read() {
    let device = Emulator::checked(0);
    let data = device.allocate(4, "data").unwrap();
    let (mut staged, mut read) = ([1u8; 4], [0u8; 4]);
    // SAFETY: both arrays outlive the synchronization.
    unsafe {
        device.upload(Stream::Main, data, staged.as_ptr(), 4).unwrap();
        device.download(Stream::Main, data, read.as_mut_ptr(), 4).unwrap();
    }
    assert_eq!(read, [POISON; 4], "before it is done");
    staged.fill(2);
    device.synchronize().unwrap();
    assert_eq!(read, [2; 4], "a staging buffer that was used again too early shows");
}

#[test]
fn impossible_launches_are_refused() {
    let builds = emulated!(sound_exchange);
    let launched = |grid: Grid| {
        let device = Emulator::checked(0);
        let data = device.allocate(4 * COUNT, "data").unwrap();
        let defect = Defect { builds, name: "sound_exchange", data, count: COUNT as i32 };
        let numbers = [0u8; 4 * COUNT];
        // SAFETY: the memory is as large as the kernel takes it to be, and the numbers outlive the synchronization.
        unsafe {
            device.upload(Stream::Main, data, numbers.as_ptr(), numbers.len()).unwrap();
            device.launch(Stream::Main, &defect, grid).unwrap();
        }
        device.synchronize().unwrap_err().to_string()
    };
    for (grid, words) in [
        (Grid::row(1, 1025), "1025 threads"),
        (Grid::row(0, 64), "a grid of 0"),
        (Grid { blocks: [1, 65_536, 1], threads: 64, shared_bytes: 0 }, "65536"),
        (Grid::row(1, 64).with_shared(100 << 10), "102400 bytes of shared memory"),
        (Grid::row(1, 64).with_shared(128), "of 128 bytes of shared memory"),
    ] {
        let said = launched(grid);
        assert!(said.contains(words), "{words}: {said}");
    }
}

#[test]
fn arguments_of_other_sizes_are_refused() {
    struct Short(Builds);
    impl Launch for Short {
        fn kernel(&self) -> Kernel {
            Kernel { name: "sound_exchange", file: "defects", emulated: self.0 }
        }

        fn arguments(&self) -> Vec<(*const std::ffi::c_void, usize)> {
            vec![(std::ptr::null(), 8)]
        }
    }
    let device = Emulator::checked(0);
    // SAFETY: it is not launched.
    let error =
        unsafe { device.launch(Stream::Main, &Short(emulated!(sound_exchange)), Grid::row(1, 64)) }.unwrap_err();
    assert!(error.to_string().contains("arguments of [8] bytes; the kernel declares [8, 4]"), "{error}");
}
