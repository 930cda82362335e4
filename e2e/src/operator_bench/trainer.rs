//! `/progress` of every training pod, answered by one socket: the address that was asked tells which pod is meant.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Result;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{interval, timeout};
use tunesmith_crds::names::TRAINER_PORT;

use super::reports;
use crate::network::Network;

const PATIENCE: Duration = Duration::from_secs(5);
/// How long a training loads, and how long it publishes, in its own time.
const EDGE: Duration = Duration::from_secs(2);

/// How far a pod is.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Pace {
    /// With all others that train for good: their clock goes or stands still.
    Shared,
    /// From when it began, to its end.
    Own(Instant, Duration),
}

/// The training pods.
#[derive(Clone, Default)]
pub(crate) struct Trainers(Arc<State>);

#[derive(Default)]
struct State {
    pods: Mutex<HashMap<IpAddr, Pace>>,
    /// Seconds for which the shared clock has gone.
    clock: AtomicU64,
    goes: AtomicBool,
    asked: AtomicU64,
}

impl Trainers {
    /// Answers at every pod's address from now on.
    pub(crate) fn start(network: &Network) -> Result<Self> {
        let socket = network.listen(TRAINER_PORT)?;
        socket.set_nonblocking(true)?;
        let listener = TcpListener::from_std(socket)?;
        let trainers = Self::default();
        tokio::spawn(trainers.clone().serve(listener));
        tokio::spawn(trainers.clone().tick());
        Ok(trainers)
    }

    /// The pod at this address trains.
    pub(crate) fn train(&self, address: IpAddr, pace: Pace) {
        self.0.pods.lock().unwrap_or_else(PoisonError::into_inner).insert(address, pace);
    }

    /// Lets the shared clock go, or stand still.
    pub(crate) fn go(&self, goes: bool) {
        self.0.goes.store(goes, Ordering::Relaxed);
    }

    /// How often pods have been asked.
    pub(crate) fn asked(&self) -> u64 {
        self.0.asked.load(Ordering::Relaxed)
    }

    async fn tick(self) {
        let mut seconds = interval(Duration::from_secs(1));
        loop {
            seconds.tick().await;
            if self.0.goes.load(Ordering::Relaxed) {
                self.0.clock.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    async fn serve(self, listener: TcpListener) {
        loop {
            // An accept that fails (too many files) may succeed later.
            let Ok((stream, _)) = listener.accept().await else { continue };
            let trainers = self.clone();
            tokio::spawn(async move { timeout(PATIENCE, trainers.answer(stream)).await });
        }
    }

    async fn answer(self, mut stream: TcpStream) -> std::io::Result<()> {
        let pace = {
            let pods = self.0.pods.lock().unwrap_or_else(PoisonError::into_inner);
            pods.get(&stream.local_addr()?.ip()).copied()
        };
        let Some(pace) = pace else { return Ok(()) };
        let mut request = [0; 1024];
        // A keep-alive connection may ask many times.
        while stream.read(&mut request).await? > 0 {
            self.0.asked.fetch_add(1, Ordering::Relaxed);
            let body = self.said(pace).to_string();
            let head =
                format!("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n", body.len());
            stream.write_all(format!("{head}{body}").as_bytes()).await?;
        }
        Ok(())
    }

    fn said(&self, pace: Pace) -> serde_json::Value {
        match pace {
            Pace::Shared => reports::progress("Training", self.0.clock.load(Ordering::Relaxed) + 1),
            Pace::Own(begun, length) => {
                let gone = begun.elapsed();
                let stage = match () {
                    () if gone < EDGE => "Loading",
                    () if gone + EDGE < length => "Training",
                    () => "Publishing",
                };
                reports::progress(stage, gone.as_secs().min(reports::STEPS))
            }
        }
    }
}
