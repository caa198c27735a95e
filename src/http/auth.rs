//! Who may come in. Runs before a body is read: bearer token first, then what the connection tells.
//!
//! A request that offers a token is judged by the token alone: a bad one is never papered over by
//! the connection's own rights. Failures are recorded in the audit log, a few per second at most,
//! with the number of those left out.

use std::future::{Ready, ready};

use actix_web::body::{BoxBody, MessageBody};
use actix_web::dev::{Payload, ServiceRequest, ServiceResponse};
use actix_web::http::header;
use actix_web::middleware::Next;
use actix_web::web::Data;
use actix_web::{Error, FromRequest, HttpMessage, HttpRequest};

use crate::audit::{Action, AuditLog, Event, Outcome, Refusals};
use crate::http::limit::{Limiter, RateLimit};
use crate::http::peer::{CertificateRule, LocalUser, Peer};
use crate::http::problem::{Code, Problem};
use crate::identity::{Caller, Principal, ScopeSet, UserCaller};
use crate::ids::{ClientId, RequestId, TenantId};
use crate::issuer::{BearerError, Issuer};

/// Turns requests into callers.
pub struct Gate {
    issuer: Issuer,
    tenant: TenantId,
    local_users: Vec<LocalUser>,
    certificates: Vec<CertificateRule>,
    principals: Limiter<Principal>,
    /// Ids that do not exist share one count: a client can make up as many as it likes.
    clients: Limiter<Option<ClientId>>,
    refusals: Refusals,
}

impl Gate {
    /// A gate for one tenant with the configured rules.
    pub fn new(
        issuer: Issuer,
        audit: AuditLog,
        tenant: TenantId,
        rules: (Vec<LocalUser>, Vec<CertificateRule>),
        limit: RateLimit,
    ) -> Self {
        let (local_users, certificates) = rules;
        Self {
            issuer,
            tenant,
            local_users,
            certificates,
            principals: Limiter::new(limit),
            clients: Limiter::new(limit),
            refusals: Refusals::new(audit),
        }
    }

    /// To be called now and then: drops counters of principals that have been quiet.
    pub fn forget_idle(&self) {
        self.principals.forget_idle();
        self.clients.forget_idle();
    }

    /// Counts a request at the token endpoint, before its secret is looked at: trying secrets must not
    /// be faster than working with one.
    pub(super) async fn count_client(&self, id: &ClientId) -> Result<(), Problem> {
        let known = self.issuer.knows(id).await;
        let wait = self.clients.check(&known.then(|| id.clone()));
        wait.map_err(|wait| Problem::new(Code::RateLimited).retry_after(wait))
    }

    pub(super) async fn admit(&self, request: &HttpRequest) -> Result<Caller, Problem> {
        let id = request_id(request);
        let caller = match bearer(request) {
            Some(Ok(token)) => match self.issuer.authenticate(token, id.clone()).await {
                Ok(caller) => caller,
                Err(error) => return Err(self.refused(error, id)),
            },
            Some(Err(())) => return Err(self.refused(BearerError::Invalid("not a bearer token"), id)),
            None => self.admit_peer(request, id)?,
        };
        self.count(&caller)?;
        Ok(caller)
    }

    /// The person whose opaque token the request brings. The connection's own rights are no person's.
    pub(super) async fn admit_user(&self, request: &HttpRequest) -> Result<UserCaller, Problem> {
        let id = request_id(request);
        let token = match bearer(request) {
            Some(Ok(token)) => token,
            Some(Err(())) => return Err(self.refused(BearerError::Invalid("not a bearer token"), id)),
            None => return Err(Problem::new(Code::Unauthenticated)),
        };
        let user = self.issuer.authenticate_user(token, id.clone()).await;
        let user = user.map_err(|error| self.refused(error, id))?;
        self.count(&user.caller)?;
        Ok(user)
    }

    fn count(&self, caller: &Caller) -> Result<(), Problem> {
        let wait = self.principals.check(&caller.principal);
        wait.map_err(|wait| Problem::new(Code::RateLimited).retry_after(wait))
    }

    fn admit_peer(&self, request: &HttpRequest, id: RequestId) -> Result<Caller, Problem> {
        let Some(peer) = request.conn_data::<Peer>() else {
            return Err(Problem::new(Code::Unauthenticated));
        };
        match peer.admit(&self.local_users, &self.certificates) {
            Some((principal, scopes)) => {
                Ok(Caller { principal, tenant: self.tenant.clone(), scopes, request: id })
            }
            None => {
                self.record_failure("no-rule-for-peer", id);
                Err(Problem::new(Code::Unauthenticated))
            }
        }
    }

    fn refused(&self, error: BearerError, id: RequestId) -> Problem {
        if let BearerError::Invalid(reason) = error {
            tracing::debug!(request_id = %id, reason, "token refused");
            self.record_failure("invalid-token", id);
        }
        error.into()
    }

    fn record_failure(&self, code: &'static str, id: RequestId) {
        count_failure(code);
        let nobody = Caller {
            principal: Principal::Anonymous,
            tenant: self.tenant.clone(),
            scopes: ScopeSet::NONE,
            request: id,
        };
        let event = Event::new(Action::AuthFail, "request", nobody.request.as_str());
        self.refusals.record(&nobody, event, Outcome::Denied(code));
    }
}

/// Counts a credential that was not valid.
pub(super) fn count_failure(reason: &'static str) {
    metrics::counter!("lacre_auth_failures_total", "reason" => reason).increment(1);
}

/// The id that `observe` gave the request.
pub(super) fn request_id(request: &HttpRequest) -> RequestId {
    request.extensions().get::<RequestId>().cloned().unwrap_or_else(RequestId::generate)
}

/// The bearer token; `Some(Err)` if there is an Authorization header of another kind.
pub(super) fn bearer(request: &HttpRequest) -> Option<Result<&str, ()>> {
    let header = request.headers().get(header::AUTHORIZATION)?;
    // RFC 9110, section 11.1: the scheme is case-insensitive.
    let token = header.to_str().ok().and_then(|text| text.split_once(' ')).and_then(|(scheme, token)| {
        scheme.eq_ignore_ascii_case("bearer").then_some(token.trim()).filter(|token| !token.is_empty())
    });
    Some(token.ok_or(()))
}

/// The caller of a request whose body was not read yet. Without a gate nobody is let in.
pub(super) async fn admit(request: &ServiceRequest) -> Result<Caller, Problem> {
    match request.app_data::<Data<Gate>>().cloned() {
        Some(gate) => gate.admit(request.request()).await,
        None => Err(Problem::new(Code::Internal)),
    }
}

/// Middleware: lets a request through to the routes below with its [`Caller`], or answers for them.
pub(super) async fn authenticate(
    request: ServiceRequest,
    next: Next<impl MessageBody + 'static>,
) -> Result<ServiceResponse<BoxBody>, Error> {
    match admit(&request).await {
        Ok(caller) => {
            request.extensions_mut().insert(caller);
            Ok(next.call(request).await?.map_into_boxed_body())
        }
        // Not `into_response`: that one forgets the error, and `observe` would find no problem to write.
        Err(problem) => Ok(request.error_response(problem)),
    }
}

impl FromRequest for Caller {
    type Error = Error;
    type Future = Ready<Result<Self, Error>>;

    fn from_request(request: &HttpRequest, _: &mut Payload) -> Self::Future {
        let caller = request.extensions().get::<Self>().cloned();
        ready(caller.ok_or_else(|| Problem::new(Code::Unauthenticated).into()))
    }
}

#[cfg(test)]
mod tests {
    use actix_web::test::TestRequest;

    use super::*;

    #[test]
    fn the_scheme_is_read_without_regard_to_case() {
        for text in ["Bearer abc", "bearer abc", "BEARER  abc"] {
            let request = TestRequest::default().insert_header(("Authorization", text)).to_http_request();
            assert_eq!(bearer(&request), Some(Ok("abc")), "{text}");
        }
    }

    #[test]
    fn another_credential_is_not_the_same_as_none() {
        let none = TestRequest::default().to_http_request();
        assert_eq!(bearer(&none), None);
        for text in ["Basic abc", "Bearer ", "Bearer", "abc"] {
            let request = TestRequest::default().insert_header(("Authorization", text)).to_http_request();
            assert_eq!(bearer(&request), Some(Err(())), "{text}");
        }
    }
}
