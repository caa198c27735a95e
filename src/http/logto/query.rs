//! What paths and queries of the Logto family name: ids, yes and no, pages.
//!
//! An id in a path that cannot be one is an id that nothing has: whether another refusal comes before "no such
//! thing" is the service's to say.

use actix_web::http::StatusCode;
use actix_web::http::header::{self, HeaderName};
use actix_web::{HttpRequest, HttpResponseBuilder};
use url::form_urlencoded;

use super::error::ApiError;
use crate::ids::{ConnectorId, TokenSetId, UserId};
use crate::tokens::{Connection, Family};

const TOTAL: HeaderName = HeaderName::from_static("total-number");

/// The longest page, and the last one that can be asked for.
const LONGEST: u64 = 100;
const LAST: u64 = 1 << 31;

/// No connector is made with it.
const NOWHERE: &str = "there-is-no-connection-of-such-a-name";

pub(super) fn user_id(text: &str) -> UserId {
    UserId::parse(text).unwrap_or_else(|_| UserId::generate())
}

pub(super) fn connector_id(text: &str) -> ConnectorId {
    ConnectorId::parse(text).unwrap_or_else(|_| ConnectorId::generate())
}

pub(super) fn set_id(text: &str) -> TokenSetId {
    TokenSetId::parse(text).unwrap_or_else(|_| TokenSetId::generate())
}

pub(super) fn connection(family: Family, text: &str) -> Connection {
    Connection::parse(family, text).unwrap_or_else(|| Connection { family, target: NOWHERE.to_owned() })
}

/// A parameter of the query.
pub(super) fn parameter(request: &HttpRequest, name: &str) -> Option<String> {
    let mut members = form_urlencoded::parse(request.query_string().as_bytes());
    members.find(|(found, _)| found == name).map(|(_, value)| value.into_owned())
}

/// The one parser of yes and no (contract, section 7.1). What is absent or anything else is a no.
pub(super) fn says_yes(request: &HttpRequest, name: &str) -> bool {
    const YES: [&str; 6] = ["1", "true", "y", "yes", "yep", "yeah"];
    let value = parameter(request, name);
    value.is_some_and(|value| YES.iter().any(|yes| value.eq_ignore_ascii_case(yes)))
}

/// `?page=&page_size=`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Page {
    /// 1, 2, ...
    pub(super) number: u64,
    pub(super) size: u64,
}

impl Page {
    /// The page that is asked for; `None` if none is.
    ///
    /// # Errors
    /// 400 if there is no such page.
    pub(super) fn read(request: &HttpRequest) -> Result<Option<Self>, ApiError> {
        let (number, size) = (parameter(request, "page"), parameter(request, "page_size"));
        if number.is_none() && size.is_none() {
            return Ok(None);
        }
        let number = whole(number.as_deref(), 1, LAST)?;
        Ok(Some(Self { number, size: whole(size.as_deref(), 20, LONGEST)? }))
    }

    /// What lies on this page of a list that is at hand.
    pub(super) fn of<T>(self, items: &[T]) -> &[T] {
        let size = usize::try_from(self.size).unwrap_or(usize::MAX);
        let page = usize::try_from(self.number - 1).unwrap_or(usize::MAX);
        items.chunks(size).nth(page).unwrap_or_default()
    }

    /// `Total-Number`, and `Link` to the first, last, previous and next page (RFC 8288).
    pub(super) fn put_headers(self, response: &mut HttpResponseBuilder, request: &HttpRequest, total: u64) {
        let last = total.div_ceil(self.size).max(1);
        let mut links = vec![(1, "first"), (last, "last")];
        if self.number > 1 {
            links.push(((self.number - 1).min(last), "prev"));
        }
        if self.number < last {
            links.push((self.number + 1, "next"));
        }
        let links: Vec<_> = links.iter().map(|(page, kind)| link(request, *page, kind)).collect();
        response.insert_header((TOTAL, total)).insert_header((header::LINK, links.join(", ")));
    }
}

impl Default for Page {
    fn default() -> Self {
        Self { number: 1, size: 20 }
    }
}

fn whole(text: Option<&str>, default: u64, most: u64) -> Result<u64, ApiError> {
    let number = text.map_or(Some(default), |text| text.parse().ok());
    number.filter(|number| (1..=most).contains(number)).ok_or_else(|| {
        let message = "page and page_size are whole numbers from 1, page_size at most 100.";
        ApiError::new(StatusCode::BAD_REQUEST, "guard.invalid_pagination", message)
    })
}

/// The address of this request with another page in it.
fn link(request: &HttpRequest, page: u64, kind: &str) -> String {
    let (mut query, mut is_put) = (form_urlencoded::Serializer::new(String::new()), false);
    for (name, value) in form_urlencoded::parse(request.query_string().as_bytes()) {
        if name != "page" {
            query.append_pair(&name, &value);
        } else if !is_put {
            query.append_pair("page", &page.to_string());
            is_put = true;
        }
    }
    if !is_put {
        query.append_pair("page", &page.to_string());
    }
    let connection = request.connection_info();
    let (scheme, host, path) = (connection.scheme(), connection.host(), request.path());
    format!("<{scheme}://{host}{path}?{}>; rel=\"{kind}\"", query.finish())
}

#[cfg(test)]
mod tests {
    use actix_web::HttpResponse;
    use actix_web::test::TestRequest;

    use super::*;

    fn asked(query: &str) -> HttpRequest {
        TestRequest::with_uri(&format!("/api/users{query}"))
            .insert_header(("host", "keys.example"))
            .to_http_request()
    }

    #[test]
    fn yes_has_six_spellings_and_everything_else_is_no() {
        for yes in ["1", "true", "y", "yes", "yep", "yeah", "TRUE", "Yes", "yEaH"] {
            assert!(
                says_yes(&asked(&format!("?a=b&includeTokenSecret={yes}")), "includeTokenSecret"),
                "{yes}"
            );
        }
        for no in ["", "?includeTokenSecret", "?includeTokenSecret=", "?includeTokenSecret=false"] {
            assert!(!says_yes(&asked(no), "includeTokenSecret"), "{no}");
        }
        for no in ["0", "2", "on", "t", "yes%20", "no", "11"] {
            assert!(!says_yes(&asked(&format!("?includeTokenSecret={no}")), "includeTokenSecret"), "{no}");
        }
    }

    #[test]
    fn pages_begin_with_1_and_have_at_most_100() {
        let read =
            |query: &str| Page::read(&asked(query)).map(|page| page.map(|page| (page.number, page.size)));
        assert_eq!(read("").unwrap(), None);
        assert_eq!(read("?page=3").unwrap(), Some((3, 20)));
        assert_eq!(read("?page_size=100").unwrap(), Some((1, 100)));
        for bad in ["?page=0", "?page=-1", "?page=x", "?page_size=0", "?page_size=101", "?page=99999999999"] {
            assert_eq!(read(bad).unwrap_err().to_string(), "guard.invalid_pagination", "{bad}");
        }
        assert_eq!(Page { number: 2, size: 2 }.of(&[1, 2, 3]), [3]);
        assert!(Page { number: LAST, size: 2 }.of(&[1, 2, 3]).is_empty());
    }

    #[test]
    fn links_lead_to_the_other_pages_with_the_same_query() {
        let links = |number, total| {
            let mut response = HttpResponse::Ok();
            let request = asked("?page=2&search=%25a%26b%25&page_size=10");
            Page { number, size: 10 }.put_headers(&mut response, &request, total);
            let response = response.finish();
            assert_eq!(response.headers().get("total-number").unwrap().to_str().unwrap(), total.to_string());
            response.headers().get("link").unwrap().to_str().unwrap().to_owned()
        };
        let to = |page: u64, kind: &str| {
            let query = format!("page={page}&search=%25a%26b%25&page_size=10");
            format!("<http://keys.example/api/users?{query}>; rel=\"{kind}\"")
        };
        assert_eq!(links(2, 35), [to(1, "first"), to(4, "last"), to(1, "prev"), to(3, "next")].join(", "));
        assert_eq!(links(1, 0), [to(1, "first"), to(1, "last")].join(", "));
        assert_eq!(links(9, 20), [to(1, "first"), to(2, "last"), to(2, "prev")].join(", "));
    }

    #[test]
    fn what_cannot_be_an_id_is_the_id_of_nothing() {
        for text in ["a b", "", "ü", "a/b", &"x".repeat(300)] {
            assert_ne!(user_id(text).as_str(), text);
            assert_eq!(connection(Family::Social, text).target, NOWHERE, "{text}");
        }
        assert_eq!(user_id("q29640o27alz").as_str(), "q29640o27alz");
    }
}
