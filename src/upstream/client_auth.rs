//! How a client proves to a provider who it is.

use std::time::Duration;

use jsonwebtoken::{Algorithm, EncodingKey, Header};
use secrecy::{ExposeSecret, SecretString};
use serde_json::json;
use url::{Url, form_urlencoded};
use uuid::Uuid;

use crate::clock::Timestamp;

use super::classify::{Class, TokenFailure};
use super::exchange::Request;

/// A client assertion is of no use to a thief after this time.
const ASSERTION_LIFE: Duration = Duration::from_mins(10);
const ASSERTION_TYPE: &str = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer";

/// The methods of OpenID Connect Core, section 9, as far as they need a secret at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientAuth {
    /// `client_secret_post`: in the body, after the grant's own parameters.
    Post,
    /// `client_secret_basic`: in the `Authorization` header, form-encoded first (RFC 6749, section 2.3.1).
    Basic,
    /// As `Basic`, but id and secret are not form-encoded first. Many providers expect it so.
    BasicRaw,
    /// `client_secret_jwt`: an assertion that is signed with the secret (RFC 7523).
    SecretJwt(HmacAlg),
    /// `none`: a public client.
    None,
}

/// The hash of a client assertion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HmacAlg {
    /// HMAC with SHA-256.
    Hs256,
    /// HMAC with SHA-384.
    Hs384,
    /// HMAC with SHA-512.
    Hs512,
}

type Params = Vec<(String, SecretString)>;

/// A client at one endpoint.
pub(super) struct Credentials<'a> {
    pub(super) endpoint: &'a Url,
    pub(super) client_id: &'a str,
    pub(super) client_secret: Option<&'a SecretString>,
    pub(super) now: Timestamp,
}

impl Credentials<'_> {
    /// A form of `params`, the client's own parameters and `extra`, in this order.
    pub(super) fn request(
        &self,
        auth: ClientAuth,
        params: Params,
        extra: Params,
    ) -> Result<Request, TokenFailure> {
        let request = Request::post(self.endpoint);
        let id = || ("client_id".to_owned(), SecretString::from(self.client_id));
        let (request, own) = match auth {
            ClientAuth::None => (request, vec![id()]),
            ClientAuth::Post => (request, vec![id(), ("client_secret".to_owned(), self.secret()?.clone())]),
            ClientAuth::BasicRaw => (request.basic(self.client_id, self.secret()?), Vec::new()),
            ClientAuth::Basic => {
                let secret = SecretString::from(form_encode(self.secret()?.expose_secret()));
                (request.basic(&form_encode(self.client_id), &secret), Vec::new())
            }
            ClientAuth::SecretJwt(alg) => {
                let kind = ("client_assertion_type".to_owned(), SecretString::from(ASSERTION_TYPE));
                (request, vec![id(), kind, ("client_assertion".to_owned(), self.assertion(alg)?)])
            }
        };
        Ok(request.form(params.into_iter().chain(own).chain(extra).collect()))
    }

    fn secret(&self) -> Result<&SecretString, TokenFailure> {
        self.client_secret.ok_or_else(|| TokenFailure::before(Class::Config, "client-secret"))
    }

    fn assertion(&self, alg: HmacAlg) -> Result<SecretString, TokenFailure> {
        let algorithm = match alg {
            HmacAlg::Hs256 => Algorithm::HS256,
            HmacAlg::Hs384 => Algorithm::HS384,
            HmacAlg::Hs512 => Algorithm::HS512,
        };
        let claims = json!({
            "iss": self.client_id,
            "sub": self.client_id,
            "aud": self.endpoint.as_str(),
            "jti": Uuid::now_v7().to_string(),
            "iat": self.now.as_secs(),
            "exp": self.now.plus(ASSERTION_LIFE).as_secs(),
        });
        let key = EncodingKey::from_secret(self.secret()?.expose_secret().as_bytes());
        let assertion = jsonwebtoken::encode(&Header::new(algorithm), &claims, &key);
        assertion.map(SecretString::from).map_err(|_| TokenFailure::before(Class::Config, "client-secret"))
    }
}

fn form_encode(text: &str) -> String {
    form_urlencoded::byte_serialize(text.as_bytes()).collect()
}
