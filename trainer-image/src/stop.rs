//! SIGTERM and Ctrl-C. While there is nothing to save, they end the process; from then on they are a request to end at
//! the next micro-batch, with a checkpoint.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use tokio::{
    runtime::Handle,
    signal::unix::{Signal, SignalKind, signal},
};
use tunesmith_crds::names::exit_code;

/// Whether the run was asked to end.
#[derive(Clone, Default)]
pub struct Stop {
    requested: Arc<AtomicBool>,
    /// Whether there is something to save first.
    held_off: Arc<AtomicBool>,
    /// Checks after which a test's run is stopped.
    #[cfg(test)]
    countdown: Option<Arc<std::sync::atomic::AtomicI64>>,
}

impl Stop {
    /// Listens for SIGTERM and SIGINT: the first ends the process at once, in the middle of a download or of a file. (The
    /// kernel's own default does not: the trainer is process 1 of its container.) After [`Stop::hold_off`] the first
    /// asks for the end, and the second brings it.
    ///
    /// # Errors
    /// Signals can't be listened to.
    pub fn on_signals(runtime: &Handle) -> std::io::Result<Self> {
        let stop = Self::default();
        let requested = stop.clone();
        let mut signals = Signals::new(runtime)?;
        runtime.spawn(async move {
            signals.next().await;
            if requested.held_off.load(Ordering::Relaxed) {
                tracing::info!("asked to stop: the run ends after a checkpoint");
                requested.request();
                signals.next().await;
            }
            std::process::exit(exit_code::PREEMPTED);
        });
        Ok(stop)
    }

    /// From now on there is something to save before the end.
    pub fn hold_off(&self) {
        self.held_off.store(true, Ordering::Relaxed);
    }

    /// Asks for the end.
    pub fn request(&self) {
        self.requested.store(true, Ordering::Relaxed);
    }

    /// Whether the end was asked for.
    pub fn is_requested(&self) -> bool {
        #[cfg(test)]
        if self.countdown.as_ref().is_some_and(|left| left.fetch_sub(1, Ordering::Relaxed) <= 0) {
            self.request();
        }
        self.requested.load(Ordering::Relaxed)
    }

    /// Asks for the end by itself after this many checks.
    #[cfg(test)]
    pub(crate) fn after(checks: i64) -> Self {
        Self { countdown: Some(Arc::new(checks.into())), ..Self::default() }
    }
}

/// The two ways in which a process is asked to end.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new(runtime: &Handle) -> std::io::Result<Self> {
        let _inside = runtime.enter();
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}
