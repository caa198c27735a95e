//! Conditional answers (RFC 9110, section 13): a tag made of the body, and 304 for who has that body.

use actix_web::http::header::{self, HeaderMap};
use sha2::{Digest, Sha256};

/// The strong tag of a body.
pub(super) fn tag_of(body: &[u8]) -> String {
    format!("\"{}\"", hex::encode(&Sha256::digest(body)[..16]))
}

/// Whether If-None-Match names the tag. Compared weakly, as the header demands: a proxy that compresses makes
/// tags weak.
pub(super) fn is_known(headers: &HeaderMap, tag: &str) -> bool {
    let mut known = headers.get_all(header::IF_NONE_MATCH).filter_map(|value| value.to_str().ok());
    known.any(|known| {
        known.split(',').map(str::trim).any(|one| one == "*" || one.strip_prefix("W/").unwrap_or(one) == tag)
    })
}

#[cfg(test)]
mod tests {
    use actix_web::test::TestRequest;

    use super::*;

    #[test]
    fn a_tag_is_found_in_lists_weak_ones_and_in_several_lines() {
        let tag = tag_of(b"body");
        let known = |lines: &[&str]| {
            let request = lines.iter().fold(TestRequest::default(), |request, line| {
                request.append_header(("If-None-Match", *line))
            });
            is_known(request.to_http_request().headers(), &tag)
        };

        let weak = format!("W/{tag}");
        assert!(known(&[&tag]) && known(&[&weak]) && known(&["*"]));
        assert!(known(&[&format!("\"a\", {weak}")]) && known(&["\"a\"", &tag]));
        assert!(!known(&[]) && !known(&["\"a\""]) && !known(&[tag.trim_matches('"')]));
    }
}
