//! Bodies that hold a released value: built in a buffer of exactly the right size, so that growing
//! leaves no copies behind, and wiped when the last reader lets go.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use actix_web::body::{BodySize, MessageBody};
use actix_web::http::header;
use actix_web::{HttpResponse, HttpResponseBuilder};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use serde::Serialize;
use zeroize::Zeroizing;

/// A response body that wipes itself.
pub(super) struct SecretBody(Option<Zeroizing<Vec<u8>>>, u64);

impl SecretBody {
    pub(super) fn new(bytes: Zeroizing<Vec<u8>>) -> Self {
        let len = bytes.len() as u64;
        Self(Some(bytes), len)
    }

    /// A copy of `value`.
    pub(super) fn copy_of(value: &[u8]) -> Self {
        Self::new(Zeroizing::new(value.to_vec()))
    }

    /// An answer that nobody may keep.
    pub(super) fn respond(self, mut response: HttpResponseBuilder, media: &str) -> HttpResponse {
        response.insert_header((header::CACHE_CONTROL, "no-store")).content_type(media);
        response
            .message_body(self)
            .map_or_else(|_| HttpResponse::InternalServerError().finish(), HttpResponse::map_into_boxed_body)
    }

    /// What will be sent.
    pub(super) fn bytes(&self) -> &[u8] {
        self.0.as_ref().map_or(&[], |bytes| bytes)
    }
}

struct Owner(Zeroizing<Vec<u8>>);

impl AsRef<[u8]> for Owner {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl MessageBody for SecretBody {
    type Error = Infallible;

    fn size(&self) -> BodySize {
        BodySize::Sized(self.1)
    }

    fn poll_next(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Bytes, Self::Error>>> {
        let bytes = self.0.take().filter(|bytes| !bytes.is_empty());
        // The buffer itself is handed over, not a copy: its destructor is the wipe.
        Poll::Ready(bytes.map(|bytes| Ok(Bytes::from_owner(Owner(bytes)))))
    }
}

/// Writes JSON that holds values, into memory reserved beforehand.
pub(super) struct SecretJson(Zeroizing<Vec<u8>>);

impl SecretJson {
    /// `capacity`: see [`utf8_len`] and [`base64_len`], plus what is around the values.
    pub(super) fn with_capacity(capacity: usize) -> Self {
        Self(Zeroizing::new(Vec::with_capacity(capacity)))
    }

    /// Opens an object with the members of `meta`; `member` goes on. `meta` holds nothing secret.
    pub(super) fn object(meta: &impl Serialize, capacity: usize) -> Self {
        let text = serde_json::to_string(meta).unwrap_or_else(|_| "{}".to_owned());
        let mut json = Self::with_capacity(text.len() + capacity + 64);
        json.raw(text.strip_suffix('}').unwrap_or(&text));
        json
    }

    /// Verbatim, for punctuation and names.
    pub(super) fn raw(&mut self, text: &str) -> &mut Self {
        self.0.extend_from_slice(text.as_bytes());
        self
    }

    /// JSON that was written before, such as one item of a batch.
    pub(super) fn part(&mut self, body: &SecretBody) -> &mut Self {
        self.0.extend_from_slice(body.bytes());
        self
    }

    /// A comma if one is due, and the name of a member.
    pub(super) fn name(&mut self, name: &str) -> &mut Self {
        if self.0.last().is_some_and(|last| *last != b'{') {
            self.raw(",");
        }
        self.raw("\"").raw(name).raw("\":")
    }

    /// A string of UTF-8 text.
    pub(super) fn utf8(&mut self, text: &str) -> &mut Self {
        // Writing to memory does not fail.
        let _ = serde_json::to_writer(&mut *self.0, text);
        self
    }

    /// A string of base64 (RFC 4648, section 4).
    pub(super) fn base64(&mut self, bytes: &[u8]) -> &mut Self {
        self.raw("\"");
        let start = self.0.len();
        self.0.resize(start + base64_len(bytes.len()), 0);
        let written = STANDARD.encode_slice(bytes, &mut self.0[start..]).unwrap_or(0);
        self.0.truncate(start + written);
        self.raw("\"")
    }

    pub(super) fn finish(self) -> SecretBody {
        SecretBody::new(self.0)
    }
}

/// Bytes that `text` takes inside a JSON string as `serde_json` escapes it.
pub(super) fn utf8_len(text: &[u8]) -> usize {
    text.iter()
        .map(|byte| match byte {
            b'"' | b'\\' | 0x08 | 0x09 | 0x0a | 0x0c | 0x0d => 2,
            0x00..=0x1f => 6,
            _ => 1,
        })
        .sum()
}

/// Bytes that `len` bytes take as base64 with padding.
pub(super) const fn base64_len(len: usize) -> usize {
    len.div_ceil(3) * 4
}

#[cfg(test)]
mod tests {
    use actix_web::body::to_bytes;
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn the_reserved_length_is_exact_for_every_character() {
        let text: String = (0_u8..=0x7f).map(char::from).chain("é€𝄞".chars()).collect();
        let mut json = SecretJson::with_capacity(utf8_len(text.as_bytes()) + 2);
        let before = json.0.capacity();
        json.utf8(&text);

        assert_eq!(json.0.len(), utf8_len(text.as_bytes()) + 2);
        assert_eq!(json.0.capacity(), before, "a reallocation would leave a copy behind");
    }

    #[actix_web::test]
    async fn values_join_the_members_that_are_there() {
        let mut json = SecretJson::object(&json!({"id": 1}), 64);
        json.name("value").utf8("a\"b").name("raw").base64(&[0xff, 0x00]).raw("}");

        let bytes = to_bytes(json.finish()).await.unwrap();
        let read: Value = serde_json::from_slice(&bytes).unwrap();
        assert_eq!(read, json!({"id": 1, "value": "a\"b", "raw": "/wA="}));
    }
}
