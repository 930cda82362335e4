//! Lists the keys of a bucket as they are. The client's own paths know no empty parts, no `..` and no control characters,
//! and one such key would make a whole listing fail; so keys pass through it percent-encoded.

use async_trait::async_trait;
use object_store::{
    ClientOptions,
    client::{HttpClient, HttpConnector, HttpError, HttpRequest, HttpResponse, HttpService, ReqwestConnector},
    path::{Path, PathPart},
};
use percent_encoding::{NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use quick_xml::{
    Reader, Writer,
    events::{BytesText, Event},
};

/// Makes HTTP clients whose listings hold percent-encoded keys.
#[derive(Clone, Copy, Debug)]
pub(super) enum KeepKeys {
    /// Listings of S3's protocol, which Google Cloud Storage answers with too.
    S3,
    /// Listings of Azure Blob Storage.
    Azure,
}

impl KeepKeys {
    /// What the query of a listing holds.
    fn query(self) -> &'static str {
        match self {
            Self::S3 => "list-type=2",
            Self::Azure => "comp=list",
        }
    }

    /// The XML element of a key.
    fn element(self) -> &'static str {
        match self {
            Self::S3 => "Key",
            Self::Azure => "Name",
        }
    }
}

impl HttpConnector for KeepKeys {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        let http = ReqwestConnector::default().connect(options)?;
        Ok(HttpClient::new(Service { http, keys: *self }))
    }
}

#[derive(Debug)]
struct Service {
    http: HttpClient,
    keys: KeepKeys,
}

#[async_trait]
impl HttpService for Service {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let is_part = |part: &str| part == self.keys.query();
        let is_listing = request.uri().query().is_some_and(|query| query.split('&').any(is_part));
        let response = self.http.execute(request).await?;
        if !is_listing || !response.status().is_success() {
            return Ok(response);
        }
        let (parts, body) = response.into_parts();
        let body = body.bytes().await?;
        // What is no listing is the client's to refuse.
        let body = encode_keys(&body, self.keys.element()).map_or(body, Into::into);
        Ok(HttpResponse::from_parts(parts, body.into()))
    }
}

/// The same listing with its keys percent-encoded; none if it is no XML.
fn encode_keys(xml: &[u8], element: &str) -> Option<Vec<u8>> {
    let mut reader = Reader::from_reader(xml);
    let mut writer = Writer::new(Vec::new());
    let mut key: Option<String> = None;
    let mut buffer = Vec::new();
    loop {
        buffer.clear();
        let event = reader.read_event_into(&mut buffer).ok()?;
        match (&event, &mut key) {
            (Event::Eof, _) => return Some(writer.into_inner()),
            (Event::Start(tag), _) if tag.local_name().as_ref() == element.as_bytes() => key = Some(String::new()),
            (Event::End(_), Some(text)) => {
                let encoded = utf8_percent_encode(text, NON_ALPHANUMERIC).to_string();
                writer.write_event(Event::Text(BytesText::new(&encoded))).ok()?;
                key = None;
            }
            (Event::Text(part), Some(text)) => {
                text.push_str(&part.decode().ok()?);
                continue;
            }
            (Event::CData(part), Some(text)) => {
                text.push_str(&part.decode().ok()?);
                continue;
            }
            (Event::GeneralRef(part), Some(text)) => {
                match part.resolve_char_ref().ok()? {
                    Some(c) => text.push(c),
                    None => text.push_str(quick_xml::escape::resolve_predefined_entity(&part.decode().ok()?)?),
                }
                continue;
            }
            _ => {}
        }
        writer.write_event(event).ok()?;
    }
}

/// The key that a path of a listing stands for.
pub(super) fn decoded_key(listed: &Path) -> String {
    percent_decode_str(listed.as_ref()).decode_utf8_lossy().into_owned()
}

/// The path that makes the client ask for exactly this key.
///
/// # Errors
/// No request can hold the key as it is.
pub(super) fn path_of_key(key: &str) -> Result<Path, String> {
    if key.starts_with('/') {
        return Err("the key begins with a slash, which HTTP clients leave out: copy the object to another key".into());
    }
    key.split('/').filter(|_| !key.is_empty()).try_fold(Path::ROOT, |path, part| {
        let part = PathPart::parse(part).map_err(|_| {
            let what =
                if part.contains("..") || part == "." { "a part that is `.` or `..`" } else { "a control character" };
            format!("the key has {what}, which HTTP clients change on the way: copy the object to another key")
        })?;
        Ok(path.join(part))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(xml: &str) -> Vec<String> {
        let xml = String::from_utf8(encode_keys(xml.as_bytes(), "Key").unwrap()).unwrap();
        let keys = xml.split("<Key>").skip(1).map(|rest| rest.split_once("</Key>").unwrap().0);
        keys.map(|key| decoded_key(&Path::parse(key).unwrap())).collect()
    }

    #[test]
    fn keys_of_a_listing_come_through_as_they_are() {
        let xml = "<?xml version=\"1.0\"?><ListBucketResult xmlns=\"x\"><Name>b</Name><Contents><Key>a//b</Key>\
            <Size>1</Size></Contents><Contents><Key>x/</Key></Contents><Contents><Key> a%20b &amp; &lt;c&gt;/&#x1;&#10;../.\
            </Key></Contents><Contents><Key><![CDATA[q?#]]></Key></Contents><Contents><Key>列</Key></Contents>\
            <NextContinuationToken>t//1</NextContinuationToken></ListBucketResult>";
        assert_eq!(keys(xml), ["a//b", "x/", " a%20b & <c>/\u{1}\n../.", "q?#", "列"]);
        let kept = String::from_utf8(encode_keys(xml.as_bytes(), "Key").unwrap()).unwrap();
        assert!(kept.contains("<NextContinuationToken>t//1</NextContinuationToken>"), "{kept}");
        assert!(encode_keys(b"<a><Key>x</b>", "Key").is_none());
    }

    #[test]
    fn blobs_of_azure_are_known_by_their_names() {
        let xml = "\u{feff}<?xml version=\"1.0\"?><EnumerationResults ContainerName=\"b\"><Blobs><Blob><Name>a//b &amp;</Name>\
            <Properties><Etag>e</Etag></Properties></Blob></Blobs><NextMarker>a//b</NextMarker></EnumerationResults>";
        let kept = String::from_utf8(encode_keys(xml.as_bytes(), "Name").unwrap()).unwrap();
        assert!(kept.contains("<Name>a%2F%2Fb%20%26</Name>"), "{kept}");
        assert!(kept.contains("<NextMarker>a//b</NextMarker>"), "{kept}");
    }

    #[test]
    fn a_path_holds_its_key_as_it_is_or_says_why_it_can_not() {
        for key in ["a", "a//b", "a/ b", "a%20b", "a?b#c", "[x]{y}", "a/b/", "", "列/é"] {
            assert_eq!(path_of_key(key).unwrap().as_ref(), key);
        }
        for (key, problem) in [("/a", "begins with a slash"), ("a/../b", "`..`"), ("./a", "`.`"), ("a\nb", "control")] {
            assert!(path_of_key(key).unwrap_err().contains(problem), "{key:?}");
        }
    }
}
