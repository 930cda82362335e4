//! `runs/events.out.tfevents.…`: the curve for TensorBoard. A file of TFRecords, each an `Event` of TensorFlow's
//! `event.proto`. Its times are the seconds that the run spent in steps, so the file follows from the history alone.

use crc_fast::{CrcAlgorithm, checksum};

use crate::history::{History, TrainPoint};

/// Where TensorBoard looks: it takes any file of a folder below its `--logdir` whose name has `tfevents` in it.
pub(super) const FILE: &str = "runs/events.out.tfevents.0.tunesmith";

/// The format of what follows, in the first event of every file.
const FILE_VERSION: &str = "brain.Event:2";

pub(super) fn render(history: &History) -> Vec<u8> {
    let mut before = TrainPoint::default();
    let train =
        history.logs.iter().map(|log| (log.step, log.seconds, scalars(log, &std::mem::replace(&mut before, *log))));
    let eval = history.evals.iter().map(|eval| (eval.step, eval.seconds, vec![("eval/loss", eval.loss)]));
    let mut events: Vec<_> = train.chain(eval).collect();
    events.sort_by_key(|(step, ..)| *step);
    let mut file = record(&event(0, 0.0, 3, FILE_VERSION.as_bytes()));
    for (step, seconds, scalars) in events {
        file.extend(record(&event(step, seconds, 5, &summary(&scalars))));
    }
    file
}

/// What a logged loss comes with; the speed is that since the entry `before`.
fn scalars(log: &TrainPoint, before: &TrainPoint) -> Vec<(&'static str, f64)> {
    let seconds = log.seconds - before.seconds;
    let speed = (seconds > 0.0).then(|| (log.tokens.saturating_sub(before.tokens)) as f64 / seconds);
    let always = [("train/loss", log.loss), ("train/learning_rate", log.learning_rate)];
    let sometimes =
        [log.grad_norm.map(|norm| ("train/grad_norm", norm)), speed.map(|x| ("train/tokens_per_second", x))];
    always.into_iter().chain(sometimes.into_iter().flatten()).collect()
}

/// `Event`: wall_time, step, and one of file_version (3) and summary (5).
fn event(step: u64, wall_time: f64, kind: u64, content: &[u8]) -> Vec<u8> {
    let mut message = key(1, WireType::Fixed64);
    message.extend(wall_time.to_le_bytes());
    message.extend(key(2, WireType::Varint));
    message.extend(varint(step));
    message.extend(field(kind, content));
    message
}

/// `Summary`: values, each with its tag and simple_value.
fn summary(scalars: &[(&str, f64)]) -> Vec<u8> {
    let value = |&(tag, value): &(&str, f64)| {
        let mut message = field(1, tag.as_bytes());
        message.extend(key(2, WireType::Fixed32));
        message.extend((value as f32).to_le_bytes());
        field(1, &message)
    };
    scalars.iter().flat_map(value).collect()
}

/// How protobuf stores a field.
#[derive(Clone, Copy)]
enum WireType {
    Varint = 0,
    Fixed64 = 1,
    Bytes = 2,
    Fixed32 = 5,
}

fn key(field: u64, wire_type: WireType) -> Vec<u8> {
    varint(field << 3 | wire_type as u64)
}

/// A field of bytes, text or a message.
fn field(number: u64, content: &[u8]) -> Vec<u8> {
    [&key(number, WireType::Bytes)[..], &varint(content.len() as u64), content].concat()
}

fn varint(mut value: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
    bytes
}

/// A TFRecord: length, its checksum, the data and its checksum.
fn record(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    [&length[..], &masked_crc(&length).to_le_bytes(), data, &masked_crc(data).to_le_bytes()].concat()
}

/// CRC-32C, rotated and moved, so that a checksum over data that holds checksums is a good one.
fn masked_crc(data: &[u8]) -> u32 {
    let crc = checksum(CrcAlgorithm::Crc32Iscsi, data) as u32;
    crc.rotate_right(15).wrapping_add(0xa282_ead8)
}

#[cfg(test)]
mod tests {
    use super::*;

    use crate::history::EvalPoint;

    /// What tensorboard 2.21's RecordWriter and protobuf classes make of `Event(wall_time=1.5, step=300,
    /// summary=Summary(value=[Summary.Value(tag="eval/loss", simple_value=2.5)]))`.
    const THEIRS: &str = "200000000000000029eda950\
        09000000000000f83f10ac022a120a100a096576616c2f6c6f73731500002040c8f65d85";

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn an_event_has_the_bytes_that_tensorboard_writes() {
        assert_eq!(hex(&record(&event(300, 1.5, 5, &summary(&[("eval/loss", 2.5)])))), THEIRS);
    }

    #[test]
    fn every_measurement_is_an_event_in_the_order_of_steps() {
        let log = |step, seconds, tokens| TrainPoint { step, seconds, tokens, loss: 3.0, ..TrainPoint::default() };
        let history = History {
            logs: vec![TrainPoint { grad_norm: Some(0.5), ..log(10, 2.0, 100) }, log(20, 4.0, 300)],
            evals: vec![EvalPoint::default(), EvalPoint { step: 10, seconds: 2.0, ..EvalPoint::default() }],
            ..History::default()
        };
        let loss = |step, seconds| record(&event(step, seconds, 5, &summary(&[("eval/loss", 0.0)])));
        let train = |step, seconds, scalars: &[(&str, f64)]| {
            let always = [("train/loss", 3.0), ("train/learning_rate", 0.0)];
            record(&event(step, seconds, 5, &summary(&[&always, scalars].concat())))
        };
        let expected = [
            record(&event(0, 0.0, 3, b"brain.Event:2")),
            loss(0, 0.0),
            train(10, 2.0, &[("train/grad_norm", 0.5), ("train/tokens_per_second", 50.0)]),
            loss(10, 2.0),
            train(20, 4.0, &[("train/tokens_per_second", 100.0)]),
        ];
        assert_eq!(hex(&render(&history)), hex(&expected.concat()));
    }
}
