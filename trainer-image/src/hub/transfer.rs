//! HTTP as the Hub speaks it: a download that stands still is given up, and taken up again where it broke off.

use std::{
    fs::{File, OpenOptions, TryLockError},
    io::{self, Read, Write},
    path::Path,
    thread,
    time::Duration,
};

use axum::http::{HeaderMap, Response};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::de::DeserializeOwned;
use ureq::{Agent, Body, config::RedirectAuthHeaders};

/// How often in a row a request may fail without a byte of progress.
const RETRIES: u32 = 4;
/// How long a connection may take to come about.
const CONNECT: Duration = Duration::from_secs(15);
/// The first pause before another try; each further one is twice as long.
const PAUSE: Duration = Duration::from_millis(250);
/// A repository's list of files is no longer.
const MAX_JSON_BYTES: u64 = 256 << 20;
/// How often a renamed repository may point on.
const REDIRECTS: usize = 5;
/// How long another process may hold the lock of a file that both want.
const LOCK_SECONDS: u32 = 60;
/// What stays as it is in the path of a URL.
const PATH: &AsciiSet = &NON_ALPHANUMERIC.remove(b'/').remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// Why something did not come.
#[derive(Debug)]
pub(super) enum Failure {
    /// The server's last word.
    Status(u16),
    /// Another try may help.
    Transient(String),
    /// This machine can't keep it.
    Disk(io::Error),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Disk(error)
    }
}

impl From<ureq::Error> for Failure {
    fn from(error: ureq::Error) -> Self {
        match error {
            ureq::Error::StatusCode(status) => status_failure(status),
            error => Self::Transient(error.to_string()),
        }
    }
}

fn status_failure(status: u16) -> Failure {
    match status {
        408 | 425 | 429 | 500.. => Failure::Transient(format!("status {status}")),
        status => Failure::Status(status),
    }
}

/// A file's name as part of a URL.
pub(super) fn url_path(name: &str) -> String {
    utf8_percent_encode(name, PATH).to_string()
}

/// Waits for a lock that another process may hold.
pub(super) fn lock(file: &File) -> Result<(), Failure> {
    for _ in 0..LOCK_SECONDS {
        match file.try_lock() {
            Ok(()) => return Ok(()),
            Err(TryLockError::WouldBlock) => thread::sleep(Duration::from_secs(1)),
            // Some network file systems have no locks.
            Err(TryLockError::Error(error)) if error.kind() == io::ErrorKind::Unsupported => return Ok(()),
            Err(TryLockError::Error(error)) => return Err(error.into()),
        }
    }
    Err(Failure::Transient("another process is downloading the same file".into()))
}

/// What a download goes into.
trait Target: Write {
    /// How many of the file's bytes it has.
    fn position(&self) -> io::Result<u64>;
    /// The file comes from its beginning.
    fn restart(&mut self) -> io::Result<()>;
}

impl Target for File {
    fn position(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn restart(&mut self) -> io::Result<()> {
        self.set_len(0)
    }
}

/// Passes bytes on that are kept nowhere, none of them twice.
struct Streamed<'a> {
    to: &'a mut dyn Write,
    position: u64,
    passed_on: u64,
}

impl Write for Streamed<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let known = usize::try_from(self.passed_on - self.position).unwrap_or(usize::MAX).min(bytes.len());
        self.to.write_all(&bytes[known..])?;
        self.position += bytes.len() as u64;
        self.passed_on = self.passed_on.max(self.position);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

impl Target for Streamed<'_> {
    fn position(&self) -> io::Result<u64> {
        Ok(self.position)
    }

    fn restart(&mut self) -> io::Result<()> {
        self.position = 0;
        Ok(())
    }
}

/// Requests with the token of a role.
pub(super) struct Transfer {
    agent: Agent,
    /// The same, but it shows redirects instead of following them.
    stay: Agent,
    token: Option<String>,
}

impl Transfer {
    /// A connection that brings no byte for `timeout` is given up.
    pub(super) fn new(token: Option<String>, timeout: Duration) -> Self {
        let agent = |redirects: u32| {
            let config = Agent::config_builder()
                .timeout_connect(Some(CONNECT))
                .timeout_resolve(Some(CONNECT))
                .timeout_per_read(Some(timeout))
                .timeout_per_write(Some(timeout))
                .timeout_recv_response(Some(timeout))
                .redirect_auth_headers(RedirectAuthHeaders::SameHost)
                .max_redirects(redirects)
                .max_redirects_will_error(redirects > 0)
                .user_agent(concat!("tunesmith/", env!("CARGO_PKG_VERSION")))
                // Ranges count the bytes of the file.
                .accept_encoding("identity");
            Agent::new_with_config(config.build())
        };
        Self { agent: agent(10), stay: agent(0), token }
    }

    fn get(&self, agent: &Agent, url: &str, range: Option<&str>) -> Result<Response<Body>, Failure> {
        let mut request = agent.get(url);
        if let Some(token) = &self.token {
            request = request.header("Authorization", format!("Bearer {token}"));
        }
        if let Some(range) = range {
            request = request.header("Range", range);
        }
        Ok(request.call()?)
    }

    /// A JSON document.
    pub(super) fn json<T: DeserializeOwned>(&self, url: &str) -> Result<T, Failure> {
        with_retries(|| {
            let mut body = self.get(&self.agent, url, None)?.into_body();
            let bytes = body.with_config().limit(MAX_JSON_BYTES).read_to_vec()?;
            serde_json::from_slice(&bytes)
                .map_err(|error| Failure::Transient(format!("the answer is no list of files: {error}")))
        })
    }

    /// The digest that the Hub gives for a file: SHA-256 of a large one, git's own of a small one.
    pub(super) fn etag(&self, url: &str) -> Result<String, Failure> {
        let headers = with_retries(|| self.first_answer(url))?;
        let header = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
        let etag = header("x-linked-etag").or(header("etag")).unwrap_or_default();
        let etag = etag.trim_start_matches("W/").trim_matches('"');
        let is_name = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
        match !etag.is_empty() && etag.len() <= 128 && etag.bytes().all(is_name) {
            true => Ok(etag.to_owned()),
            false => Err(Failure::Transient("the Hub gives no digest (ETag) for the file".into())),
        }
    }

    /// The Hub's own headers for a file, before it points to where the bytes are.
    fn first_answer(&self, url: &str) -> Result<HeaderMap, Failure> {
        let mut url = url.to_owned();
        for _ in 0..REDIRECTS {
            let answer = match self.get(&self.stay, &url, Some("bytes=0-0")) {
                // An empty file has no first byte.
                Err(Failure::Status(416)) => self.get(&self.stay, &url, None)?,
                answer => answer?,
            };
            let location = answer.headers().get("location").and_then(|value| value.to_str().ok());
            match location {
                // The repository has another name now.
                Some(path) if answer.status().is_redirection() && path.starts_with('/') => {
                    let base = url::Url::parse(&url).and_then(|base| base.join(path));
                    url = base.map_err(|error| Failure::Transient(error.to_string()))?.into();
                }
                _ => return Ok(answer.headers().clone()),
            }
        }
        Err(Failure::Transient("the Hub redirects without end".into()))
    }

    /// Brings the bytes that `partial` lacks.
    pub(super) fn download(&self, url: &str, partial: &Path) -> Result<(), Failure> {
        self.fill(url, &mut OpenOptions::new().create(true).append(true).open(partial)?)
    }

    /// Brings all bytes, each once, into `to`.
    pub(super) fn stream(&self, url: &str, to: &mut dyn Write) -> Result<(), Failure> {
        self.fill(url, &mut Streamed { to, position: 0, passed_on: 0 })
    }

    fn fill(&self, url: &str, target: &mut impl Target) -> Result<(), Failure> {
        let mut tries = 0;
        loop {
            let before = target.position()?;
            let failure = match self.fill_rest(url, target) {
                Ok(()) => return Ok(()),
                Err(Failure::Transient(answer)) => answer,
                Err(failure) => return Err(failure),
            };
            let now = target.position()?;
            tries = if now > before { 1 } else { tries + 1 };
            if tries > RETRIES {
                let answer = format!("{failure}, {tries} times in a row; the next attempt goes on after {now} bytes");
                return Err(Failure::Transient(answer));
            }
            tracing::warn!(bytes = now, "a download broke off, and is taken up again: {failure}");
            pause(tries);
        }
    }

    fn fill_rest(&self, url: &str, target: &mut impl Target) -> Result<(), Failure> {
        let start = target.position()?;
        let answer = match self.get(&self.agent, url, Some(&format!("bytes={start}-"))) {
            Err(Failure::Status(416)) if start == 0 => return Ok(()),
            // There is nothing after the last byte: another client left the whole file, or a wrong one.
            Err(Failure::Status(416)) => return self.check_whole(url, start, target),
            answer => answer?,
        };
        let total = match (answer.status().as_u16(), content_range(answer.headers())) {
            (206, Some((first, total))) if first == start => total,
            // Whoever ignores ranges sends it all.
            (200, _) => {
                target.restart()?;
                answer.body().content_length()
            }
            (status, range) => {
                let answer = format!("status {status} with range {range:?} instead of the bytes from {start}");
                return Err(Failure::Transient(answer));
            }
        };
        copy(&mut answer.into_body().into_reader(), target)?;
        let now = target.position()?;
        match total {
            Some(total) if now < total => Err(Failure::Transient(format!("{now} of {total} bytes came"))),
            _ => Ok(()),
        }
    }

    fn check_whole(&self, url: &str, start: u64, target: &mut impl Target) -> Result<(), Failure> {
        let answer = self.get(&self.agent, url, Some("bytes=0-0"))?;
        match content_range(answer.headers()) {
            Some((_, Some(total))) if total == start => Ok(()),
            _ => {
                target.restart()?;
                Err(Failure::Transient("what an earlier download left is no part of the file".into()))
            }
        }
    }
}

/// First byte and size of `bytes first-last/size`.
fn content_range(headers: &HeaderMap) -> Option<(u64, Option<u64>)> {
    let range = headers.get("content-range")?.to_str().ok()?.strip_prefix("bytes ")?;
    let (range, total) = range.split_once('/')?;
    Some((range.split_once('-')?.0.parse().ok()?, total.parse().ok()))
}

fn copy(from: &mut impl Read, to: &mut impl Write) -> Result<(), Failure> {
    let mut buffer = vec![0; 1 << 16];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(bytes) => to.write_all(&buffer[..bytes])?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(Failure::Transient(error.to_string())),
        }
    }
}

fn with_retries<T>(request: impl Fn() -> Result<T, Failure>) -> Result<T, Failure> {
    let mut tries = 0;
    loop {
        match request() {
            Err(Failure::Transient(_)) if tries < RETRIES => {
                tries += 1;
                pause(tries);
            }
            answer => return answer,
        }
    }
}

fn pause(tries: u32) {
    thread::sleep(PAUSE * 2_u32.pow(tries.saturating_sub(1).min(5)));
}
