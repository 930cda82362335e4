//! Kinds of files that hold no rows as they are: each is named, with what to do.

/// Bytes of a file's beginning that tell what it is.
pub(super) const HEAD_BYTES: u64 = 1 << 16;

/// First bytes of a kind, its name, and what to do.
type Kind = (&'static [u8], &'static str, &'static str);

const UNPACK: &str = "unpack it, and name the files in it (`*` stands for several)";
const DECOMPRESS: &str = "compress it with gzip or zstd instead, or not at all";
const EXPORT: &str = "export its rows as JSON Lines, CSV or Parquet";
const NO_ROWS: &str = "name a file of rows";

const KINDS: [Kind; 30] = [
    (b"Rar!", "a RAR archive", UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", UNPACK),
    (b"BZh", "a bzip2 file", DECOMPRESS),
    (b"\xfd7zXZ", "an xz file", DECOMPRESS),
    (b"\x04\x22\x4d\x18", "an lz4 file", DECOMPRESS),
    (b"\xff\x06\x00\x00sNaPpY", "a snappy file", DECOMPRESS),
    (b"PARE", "an encrypted Parquet file", "write it without encryption"),
    (b"FEA1", "a Feather file of version 1", "write it as Arrow IPC (Feather version 2) or Parquet"),
    (b"ORC", "an ORC file", EXPORT),
    (b"Obj\x01", "an Avro file", EXPORT),
    (b"SQLite format 3\0", "an SQLite database", EXPORT),
    (b"\x89HDF\r\n", "an HDF5 file", EXPORT),
    (b"\x93NUMPY", "a NumPy array", EXPORT),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Excel workbook (xls) or Office document", "save it as CSV in UTF-8"),
    (b"%PDF", "a PDF document", NO_ROWS),
    (b"{\\rtf", "an RTF document", NO_ROWS),
    (b"\x89PNG", "a PNG image", NO_ROWS),
    (b"\xff\xd8\xff", "a JPEG image", NO_ROWS),
    (b"GGUF", "a GGUF model", NO_ROWS),
    (b"\x7fELF", "a program", NO_ROWS),
    (
        b"version https://git-lfs.github.com/spec/v1",
        "a Git LFS pointer, not the file itself",
        "fetch the file with `git lfs pull`, and upload it again",
    ),
    (b"\xff\xfe\x00\x00", "UTF-32 text", "save it as UTF-8"),
    (b"\x00\x00\xfe\xff", "UTF-32 text", "save it as UTF-8"),
    (b"\xff\xfe", "UTF-16 text", "save it as UTF-8"),
    (b"\xfe\xff", "UTF-16 text", "save it as UTF-8"),
    (b"\x80\x02", PICKLE, EXPORT),
    (b"\x80\x03", PICKLE, EXPORT),
    (b"\x80\x04", PICKLE, EXPORT),
    (b"\x80\x05", PICKLE, EXPORT),
    (b"RIFF", "an audio or video file", NO_ROWS),
];

const PICKLE: &str = "a Python pickle, which is a program rather than data";

/// Where a tar archive says that it is one.
const TAR: std::ops::Range<usize> = 257..262;

/// Names the kind of a file that begins like this, and says what to do; None if it may hold rows.
pub(super) fn refused(head: &[u8]) -> Option<String> {
    let known = KINDS.iter().find(|(magic, ..)| head.starts_with(magic)).map(|&(_, kind, advice)| (kind, advice));
    known.or_else(|| by_content(head)).map(|(kind, advice)| format!("it is {kind}; {advice}"))
}

/// Kinds that no first bytes tell.
fn by_content(head: &[u8]) -> Option<(&'static str, &'static str)> {
    let holds = |text: &[u8]| head.windows(text.len()).any(|window| window == text);
    if head.starts_with(b"PK\x03\x04") || head.starts_with(b"PK\x05\x06") {
        return Some(if holds(b"xl/") || holds(b"[Content_Types].xml") {
            ("an Excel workbook (xlsx) or Office document", "save it as CSV in UTF-8")
        } else if holds(b"data.pkl") {
            ("a PyTorch file", NO_ROWS)
        } else {
            ("a zip archive", UNPACK)
        });
    }
    if head.get(TAR) == Some(b"ustar") {
        return Some(("a tar archive", UNPACK));
    }
    if is_safetensors(head) {
        return Some(("a safetensors file", NO_ROWS));
    }
    // A letter of UTF-16 is followed, or led, by a zero.
    match head {
        [first, 0, second, 0, ..] if first.is_ascii() && second.is_ascii() && *first != 0 && *second != 0 => {
            return Some(("UTF-16 text", "save it as UTF-8"));
        }
        [0, first, 0, second, ..] if first.is_ascii() && second.is_ascii() && *first != 0 && *second != 0 => {
            return Some(("UTF-16 text", "save it as UTF-8"));
        }
        _ => {}
    }
    let text = head.trim_ascii_start();
    let begins = |tag: &str| text.get(..tag.len()).is_some_and(|start| start.eq_ignore_ascii_case(tag.as_bytes()));
    if begins("<!doctype html") || begins("<html") {
        return Some((
            "an HTML page",
            "such as a login or error page that was saved in its place: download the file again",
        ));
    }
    if begins("<?xml") || begins("<error") {
        return Some((
            "an XML document",
            "such as a store's error that was saved in its place: download the file again",
        ));
    }
    None
}

/// A length of 8 bytes, and a JSON object with tensors.
fn is_safetensors(head: &[u8]) -> bool {
    let Some((length, rest)) = head.split_first_chunk::<8>() else { return false };
    let length = u64::from_le_bytes(*length);
    // Text has no zeros there.
    (2..1 << 32).contains(&length) && rest.starts_with(b"{\"")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_is_named_with_advice() {
        let mut tar = vec![b'a'; 512];
        tar[TAR].copy_from_slice(b"ustar");
        let safetensors = [&300_u64.to_le_bytes()[..], b"{\"__metadata__\":{\"format\":\"pt\"}}"].concat();
        let utf16: Vec<u8> = "{\"text\"".encode_utf16().flat_map(u16::to_le_bytes).collect();
        let kinds: [(&[u8], &str); 14] = [
            (b"PK\x03\x04rest", "a zip archive; unpack it"),
            (b"PK\x03\x04[Content_Types].xml", "an Excel workbook (xlsx) or Office document; save it as CSV"),
            (b"PK\x03\x04archive/data.pkl", "a PyTorch file"),
            (&tar, "a tar archive; unpack it"),
            (&safetensors, "a safetensors file"),
            (&utf16, "UTF-16 text; save it as UTF-8"),
            (b"\xff\xfe{\0", "UTF-16 text; save it as UTF-8"),
            (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Excel workbook"),
            (b"\x80\x04\x95", "a Python pickle"),
            (b"%PDF-1.7", "a PDF document"),
            (b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer, not the file itself; fetch"),
            (b"SQLite format 3\0", "an SQLite database; export"),
            (b"\n<!DOCTYPE html><html>", "an HTML page; such as a login"),
            (b"<?xml version=\"1.0\"?><Error><Code>NoSuchKey", "an XML document"),
        ];
        for (head, expected) in kinds {
            let refusal = refused(head).unwrap();
            assert!(refusal.starts_with(&format!("it is {expected}")), "{refusal}");
        }
    }

    #[test]
    fn rows_are_no_other_kind() {
        for head in [&b"{\"text\": \"a\"}"[..], b"[{\"text\": \"PK\"}]", b"text\na", b"", b"PAR1", b"\xef\xbb\xbf{}"] {
            assert_eq!(refused(head), None);
        }
    }
}
