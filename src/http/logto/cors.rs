//! Pages of other origins (contract, section 4.5): the Account and Verification APIs are for any, the rest for
//! none. Cookies play no part: a page has to know the person's token.

use actix_web::HttpResponse;
use actix_web::dev::ServiceRequest;
use actix_web::http::Method;
use actix_web::http::header::{self, HeaderMap, HeaderValue};

/// How long a browser need not ask again, in seconds: as long as the strictest of them keeps it.
const MAX_AGE: &str = "7200";

/// A request, as far as browsers' rules for origins look at it.
pub(super) struct Origin(Option<HeaderValue>);

impl Origin {
    /// `None`: the path is not for pages of other origins.
    pub(super) fn of(request: &ServiceRequest) -> Option<Self> {
        super::is_personal(request.path()).then(|| Self(request.headers().get(header::ORIGIN).cloned()))
    }

    /// The answer to a question that a browser asks before the request: it has no credential.
    pub(super) fn preflight(&self, request: &ServiceRequest) -> Option<HttpResponse> {
        let asked = request.headers();
        let method = asked.get(header::ACCESS_CONTROL_REQUEST_METHOD)?;
        if *request.method() != Method::OPTIONS || self.0.is_none() {
            return None;
        }
        let mut response = HttpResponse::NoContent();
        response.insert_header((header::ACCESS_CONTROL_ALLOW_METHODS, method.clone()));
        response.insert_header((header::ACCESS_CONTROL_MAX_AGE, MAX_AGE));
        // `*` would not stand for Authorization.
        if let Some(names) = asked.get(header::ACCESS_CONTROL_REQUEST_HEADERS) {
            response.insert_header((header::ACCESS_CONTROL_ALLOW_HEADERS, names.clone()));
        }
        Some(response.finish())
    }

    /// What every answer has, errors too: a page that may not read them shows nothing but a failure.
    pub(super) fn put_headers(self, headers: &mut HeaderMap) {
        if self.0.is_some() {
            headers.append(header::VARY, HeaderValue::from_static("Origin"));
        }
        let any = HeaderValue::from_static("*");
        headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, self.0.unwrap_or_else(|| any.clone()));
        headers.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, any);
    }
}
