//! Proofs: that a person is there (password), or holds an account at a provider (a sign-in there and back). A proof is
//! bound to the person, the tenant and the connector; state, nonce and code verifier are good for one answer; what
//! was brought is parked, sealed, until it is used or too late.

mod sign_in;

use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use zeroize::Zeroizing;

use super::connectors::{Definition, Endpoints, unusable};
use super::model::{Family, StartVerification, StartedVerification};
use super::providers::{self, Profile, ProfileSource};
use super::refresh::provider_error;
use super::sets::Brought;
use super::store::users as user_store;
use super::store::verifications::{self as store, Kind, Verification};
use super::{Tokens, TokensError, password};
use crate::audit::{Action, Event};
use crate::clock::Timestamp;
use crate::db::{Conn, DbError};
use crate::identity::{Caller, UserCaller};
use crate::ids::{ConnectorId, VerificationId};
use crate::upstream::{ExpectedIdToken, ExpiresIn, TokenAnswer, TokenFailure};
use sign_in::{Asked, Callback, asked, fits};

/// How far a provider's clock may be off.
const SKEW: std::time::Duration = std::time::Duration::from_secs(60);
/// What is sealed of a sign-in that came back.
#[derive(Serialize, Deserialize)]
struct Parked {
    connector: ConnectorId,
    target: String,
    expires_at: Timestamp,
    identity_id: String,
    issuer: Option<String>,
    details: Value,
    tokens: Option<ParkedTokens>,
}

/// What is sealed of a proof by password.
#[derive(Serialize, Deserialize)]
struct ByPassword {
    expires_at: Timestamp,
}

#[derive(Serialize, Deserialize)]
struct ParkedTokens {
    access_token: String,
    refresh_token: Option<String>,
    id_token: Option<String>,
    scope: Option<String>,
    token_type: Option<String>,
    expires_at: Option<i64>,
    issued_at: Timestamp,
}

/// A proven account and what came with it.
pub(super) struct Proven {
    pub(super) verification: Verification,
    pub(super) identity_id: String,
    pub(super) issuer: Option<String>,
    pub(super) details: Value,
    pub(super) brought: Option<Brought>,
}

const fn kind_of(family: Family) -> Kind {
    match family {
        Family::Social => Kind::Social,
        Family::Sso => Kind::Sso,
    }
}

impl Tokens {
    /// Begins a sign-in at a provider.
    ///
    /// # Errors
    /// [`TokensError::UnknownConnector`], [`TokensError::WrongConnector`], [`TokensError::InsufficientInfo`],
    /// [`TokensError::Invalid`], [`TokensError::Provider`] if its endpoints cannot be discovered.
    pub async fn start_verification(
        &self,
        person: &UserCaller,
        start: StartVerification,
    ) -> Result<StartedVerification, TokensError> {
        let caller = &person.caller;
        if start.state.trim().is_empty() || start.redirect_uri.trim().is_empty() {
            return Err(TokensError::InsufficientInfo);
        }
        let connector = ConnectorId::parse(&start.connector).map_err(|_| TokensError::UnknownConnector)?;
        let definition = self.definition_for(caller, start.family, &connector).await?;
        let endpoints = self.endpoints(&definition).await;
        let endpoints = endpoints.map_err(|failure| provider_error(&failure))?;
        let id = VerificationId::generate();
        let event = Event::new(Action::VerificationStart, "verification", id.as_str())
            .detail("connector", connector.as_str());
        self.parts()
            .audit
            .around(caller, event, async move |_| {
                let expires_at = self.now().plus(self.parts().config.verification_lifetime);
                let (asked, authorization_uri) = asked(&definition, &endpoints, &start, expires_at)?;
                let row = Verification {
                    id: id.clone(),
                    user: person.user.clone(),
                    kind: kind_of(start.family),
                    connector: Some(connector),
                    target: Some(definition.connector.target.clone()),
                    is_verified: false,
                    version: 1,
                    expires_at,
                };
                let place = store::place(&caller.tenant, &row.user, &id, row.version);
                // Texts always serialise.
                let bytes = Zeroizing::new(serde_json::to_vec(&asked).unwrap_or_default());
                let sealed = self.parts().vault.seal_record(place, &bytes).await?;
                let (tenant, now) = (caller.tenant.clone(), self.now());
                let work = move |conn: &mut Conn| store::insert(conn, &tenant, &row, Some(&sealed), now);
                self.parts().db.write::<_, DbError, _>(work).await?;
                Ok(StartedVerification { id, authorization_uri, expires_at })
            })
            .await
    }

    /// The connector's definition; in the words of a verification if it is not there or of another kind.
    async fn definition_for(
        &self,
        caller: &Caller,
        family: Family,
        id: &ConnectorId,
    ) -> Result<Definition, TokensError> {
        let other = match family {
            Family::Social => Family::Sso,
            Family::Sso => Family::Social,
        };
        match self.definition(caller, family, id).await {
            Err(TokensError::NotFound(_)) => match self.definition(caller, other, id).await {
                Ok(_) => Err(TokensError::WrongConnector),
                Err(TokensError::NotFound(_)) => Err(TokensError::UnknownConnector),
                Err(error) => Err(error),
            },
            definition => definition,
        }
    }

    /// Takes the answer of a sign-in: the code is turned in, the account looked at, and both parked in the proof. One
    /// answer ends the sign-in, be it good or bad.
    ///
    /// # Errors
    /// [`TokensError::NoVerification`], [`TokensError::Callback`], [`TokensError::Invalid`], [`TokensError::Provider`].
    pub async fn verify(
        &self,
        person: &UserCaller,
        family: Family,
        record: &str,
        data: &Map<String, Value>,
    ) -> Result<VerificationId, TokensError> {
        let caller = &person.caller;
        // What is no id is not for the log: it may be anything.
        let named = VerificationId::parse(record).map(String::from).unwrap_or_default();
        let refused = Event::new(Action::VerificationVerify, "verification", named);
        let callback = match Callback::read(data) {
            Ok(callback) => callback,
            Err(why) => return self.deny(caller, refused, why).await,
        };
        let found = self.verification(person, record).await?;
        let open = found.filter(|(found, _)| found.kind == kind_of(family) && !found.is_verified);
        let Some((mut verification, Some(sealed))) = open else {
            return self.deny(caller, refused, TokensError::NoVerification).await;
        };
        let Some(connector) = verification.connector.clone() else {
            return self.deny(caller, refused, TokensError::NoVerification).await;
        };
        let event = Event::new(Action::VerificationVerify, "verification", verification.id.as_str())
            .detail("connector", connector.as_str());
        self.parts()
            .audit
            .around(caller, event, async move |note| {
                let place =
                    store::place(&caller.tenant, &person.user, &verification.id, verification.version);
                let vault = &self.parts().vault;
                let plain = vault.open_record(caller, &place, sealed).await?;
                let asked = plain.with(|bytes| serde_json::from_slice::<Asked>(bytes).ok());
                // The row only repeats it.
                let fits_row = |asked: &Asked| {
                    asked.connector == connector && asked.expires_at == verification.expires_at
                };
                let Some(asked) = asked.filter(fits_row) else {
                    return Err(vault.altered_at(caller, &place).await.into());
                };
                self.refuse_in_quarantine().await?;
                self.take(caller, &verification).await?;
                verification.version += 1;
                let definition = self.definition_for(caller, family, &connector).await?;
                let endpoints = self.endpoints(&definition).await;
                let endpoints = endpoints.map_err(|failure| provider_error(&failure))?;
                fits(&callback, &asked, &endpoints)?;
                let account = self.account_of(&definition, &endpoints, &callback, Some(&asked)).await;
                let (profile, brought) = account.map_err(|failure| provider_error(&failure))?;
                note.add("tokens", brought.refresh_token.is_some().to_string());
                self.park(caller, &definition, &verification, &profile, brought).await?;
                Ok(verification.id)
            })
            .await
    }

    async fn take(&self, caller: &Caller, pending: &Verification) -> Result<(), TokensError> {
        let (tenant, row) = (caller.tenant.clone(), pending.clone());
        let work = move |conn: &mut Conn| store::take(conn, &tenant, &row);
        let taken = self.parts().db.write::<_, DbError, _>(work).await?;
        taken.then_some(()).ok_or(TokensError::NoVerification)
    }

    async fn park(
        &self,
        caller: &Caller,
        definition: &Definition,
        taken: &Verification,
        profile: &Profile,
        brought: Brought,
    ) -> Result<(), TokensError> {
        let tokens = definition.connector.stores_tokens.then(|| ParkedTokens::new(&brought));
        let parked = Parked {
            connector: definition.connector.id.clone(),
            target: definition.connector.target.clone(),
            expires_at: taken.expires_at,
            identity_id: profile.id.clone(),
            issuer: definition.issuer(),
            details: profile.details(),
            tokens,
        };
        // Texts and numbers always serialise.
        let bytes = Zeroizing::new(serde_json::to_vec(&parked).unwrap_or_default());
        let place = store::place(&caller.tenant, &taken.user, &taken.id, taken.version + 1);
        let sealed = self.parts().vault.seal_record(place, &bytes).await?;
        let (tenant, row, now) = (caller.tenant.clone(), taken.clone(), self.now());
        let work = move |conn: &mut Conn| store::verified(conn, &tenant, &row, &sealed, now);
        // Gone: user, connector or storage were taken away meanwhile.
        let parked = self.parts().db.write::<_, DbError, _>(work).await?;
        parked.then_some(()).ok_or(TokensError::NoVerification)
    }

    /// Turns in a code and looks whose account it is.
    async fn account_of(
        &self,
        definition: &Definition,
        endpoints: &Endpoints,
        callback: &Callback,
        asked: Option<&Asked>,
    ) -> Result<(Profile, Brought), TokenFailure> {
        let Definition { settings, factory, .. } = definition;
        let upstream = &self.parts().upstream;
        let verifier = asked.and_then(|asked| asked.code_verifier.clone()).map(SecretString::from);
        let params =
            settings.code_exchange(factory, &callback.code, &callback.redirect_uri, verifier.as_ref());
        let issued_at = self.now();
        let request = definition.token_request(&endpoints.token, params, issued_at);
        let mut answer = upstream.token(request).await?;
        if factory.provider == providers::Provider::Facebook {
            // In a form, not in the address as Facebook's documents have it: there the secret would be in logs.
            let mut params = providers::facebook_swap(settings, &answer.access_token);
            params.retain(|(name, _)| name != "client_id");
            let mut request = definition.token_request(&endpoints.token, params, issued_at);
            // The secret is among Facebook's parameters.
            request.auth = crate::upstream::ClientAuth::None;
            request.client_secret = None;
            answer = upstream.token(request).await?;
        }
        let answer = complete(definition, answer)?;
        let profile = self.profile_of(definition, endpoints, &answer, asked).await?;
        let mut brought = Brought::new(answer, issued_at, &self.parts().config);
        // RFC 6749, section 5.1: an absent scope is the one that was asked for.
        brought.scope = brought.scope.or_else(|| asked.and_then(|asked| asked.scope.clone()));
        Ok((profile, brought))
    }

    async fn profile_of(
        &self,
        definition: &Definition,
        endpoints: &Endpoints,
        answer: &TokenAnswer,
        asked: Option<&Asked>,
    ) -> Result<Profile, TokenFailure> {
        let Definition { settings, factory, .. } = definition;
        let upstream = &self.parts().upstream;
        let claims = match (settings.needs_nonce(factory), &answer.id_token) {
            (false, _) => None,
            (true, None) => return Err(unreadable("id-token")),
            (true, Some(token)) => {
                let jwks = endpoints.jwks.as_ref().ok_or_else(|| unusable("no-jwks"))?;
                let expected = ExpectedIdToken {
                    issuer: endpoints.issuer.as_deref(),
                    audience: &settings.client_id,
                    nonce: asked.and_then(|asked| asked.nonce.as_deref()),
                    now: self.now(),
                    skew: SKEW,
                };
                Some(Value::Object(upstream.verify_id_token(token, jwks, &expected).await?))
            }
        };
        let bearer = Some(&answer.access_token);
        let source = settings.profile_source(factory).ok_or_else(|| unusable("no-profile"))?;
        let facts = match (source, claims, &endpoints.userinfo) {
            (ProfileSource::UserInfo(_), _, Some(url)) => upstream.get_json(url, bearer).await?,
            (ProfileSource::IdTokenAndUserInfo(_), Some(claims), Some(url)) => {
                let more = upstream.get_json(url, bearer).await?;
                providers::merged_claims(&claims, &more).map_err(|_| unreadable("userinfo"))?
            }
            (_, Some(claims), _) => claims,
            (_, None, _) => return Err(unreadable("profile")),
        };
        providers::profile(factory, settings, &facts).map_err(|_| unreadable("profile"))
    }

    /// The account that a code leads to, for an administrator; its tokens are not kept.
    pub(super) async fn account_by_code(
        &self,
        definition: &Definition,
        data: &Map<String, Value>,
    ) -> Result<Profile, TokensError> {
        let callback = Callback::read(data)?;
        let endpoints = self.endpoints(definition).await;
        let endpoints = endpoints.map_err(|failure| provider_error(&failure))?;
        let account = self.account_of(definition, &endpoints, &callback, None).await;
        account.map(|(profile, _)| profile).map_err(|failure| provider_error(&failure))
    }

    /// A proof by the person's password.
    ///
    /// # Errors
    /// [`TokensError::WrongPassword`].
    pub async fn verify_password(
        &self,
        person: &UserCaller,
        given: SecretString,
    ) -> Result<(VerificationId, Timestamp), TokensError> {
        let caller = &person.caller;
        let id = VerificationId::generate();
        let event = Event::new(Action::VerificationVerify, "verification", id.as_str())
            .detail("kind", Kind::Password.name());
        self.parts()
            .audit
            .around(caller, event, async move |_| {
                let (tenant, user) = (caller.tenant.clone(), person.user.clone());
                let check = move |conn: &mut Conn| {
                    let stored =
                        user_store::find(conn, &tenant, &user)?.and_then(|found| found.password_hash);
                    Ok::<_, DbError>(password::is_right(&given, stored.as_deref()))
                };
                self.inner.tries.allow(&caller.tenant, &person.user)?;
                let place = self.inner.tries.at_once.acquire().await;
                let is_right = self.parts().db.read(check).await?;
                drop(place);
                if !is_right {
                    self.inner.tries.count(&caller.tenant, &person.user);
                    return Err(TokensError::WrongPassword);
                }
                let expires_at = self.now().plus(self.parts().config.verification_lifetime);
                let row = Verification {
                    id: id.clone(),
                    user: person.user.clone(),
                    kind: Kind::Password,
                    connector: None,
                    target: None,
                    is_verified: true,
                    version: 1,
                    expires_at,
                };
                // Sealed, so that nobody makes one who can only write to the database.
                let place = store::place(&caller.tenant, &row.user, &id, row.version);
                let bytes = serde_json::to_vec(&ByPassword { expires_at }).unwrap_or_default();
                let sealed = self.parts().vault.seal_record(place, &bytes).await?;
                let (tenant, now) = (caller.tenant.clone(), self.now());
                let work = move |conn: &mut Conn| store::insert(conn, &tenant, &row, Some(&sealed), now);
                self.parts().db.write::<_, DbError, _>(work).await?;
                Ok((id, expires_at))
            })
            .await
    }

    async fn verification(
        &self,
        person: &UserCaller,
        record: &str,
    ) -> Result<Option<(Verification, Option<crate::vault::UnopenedRecord>)>, DbError> {
        let Ok(id) = VerificationId::parse(record) else { return Ok(None) };
        let (tenant, user, now) = (person.caller.tenant.clone(), person.user.clone(), self.now());
        let find = move |conn: &mut Conn| store::find(conn, &tenant, &user, &id, now);
        self.parts().db.read(find).await
    }

    /// The account that a good proof of the person is of.
    pub(super) async fn proven(
        &self,
        person: &UserCaller,
        family: Family,
        record: &str,
    ) -> Result<Proven, TokensError> {
        let found = self.verification(person, record).await?;
        let found = found.filter(|(found, _)| found.is_verified && found.kind == kind_of(family));
        let Some((verification, Some(sealed))) = found else { return Err(TokensError::NoVerification) };
        let caller = &person.caller;
        let place = store::place(&caller.tenant, &person.user, &verification.id, verification.version);
        let vault = &self.parts().vault;
        let plain = vault.open_record(caller, &place, sealed).await?;
        let parked = plain.with(|bytes| serde_json::from_slice::<Parked>(bytes).ok());
        let fits_row = |parked: &Parked| {
            verification.connector.as_ref() == Some(&parked.connector)
                && verification.target.as_deref() == Some(&parked.target)
                && verification.expires_at == parked.expires_at
        };
        let Some(parked) = parked.filter(fits_row) else {
            return Err(vault.altered_at(caller, &place).await.into());
        };
        let Parked { identity_id, issuer, details, tokens, .. } = parked;
        let brought = tokens.map(ParkedTokens::into_brought);
        Ok(Proven { verification, identity_id, issuer, details, brought })
    }

    /// Whether the person is there: asked of users who have something to prove it with. The proof stays, it is
    /// good for several changes.
    pub(super) async fn require_proof(
        &self,
        person: &UserCaller,
        proof: Option<&str>,
    ) -> Result<(), TokensError> {
        let (account, _) = self.account(&person.caller.tenant, &person.user).await?;
        let user = &account.user;
        if !user.has_password && user.primary_email.is_none() && user.primary_phone.is_none() {
            return Ok(());
        }
        let found = match proof {
            Some(proof) => self.verification(person, proof).await?,
            None => None,
        };
        let found = found.filter(|(found, _)| found.kind == Kind::Password && found.is_verified);
        let Some((found, Some(sealed))) = found else { return Err(TokensError::ProofNeeded) };
        let caller = &person.caller;
        let place = store::place(&caller.tenant, &person.user, &found.id, found.version);
        let plain = self.parts().vault.open_record(caller, &place, sealed).await?;
        match plain.with(|bytes| serde_json::from_slice::<ByPassword>(bytes).ok()) {
            Some(proof) if proof.expires_at == found.expires_at => Ok(()),
            _ => Err(self.parts().vault.altered_at(caller, &place).await.into()),
        }
    }
}

/// Whether the answer to a code has what this provider's answers must have.
fn complete(definition: &Definition, answer: TokenAnswer) -> Result<TokenAnswer, TokenFailure> {
    let has = |member: &&str| match *member {
        "scope" => answer.scope.is_some(),
        "token_type" => answer.token_type.is_some(),
        "expires_in" => matches!(answer.expires_in, ExpiresIn::Seconds(_)),
        _ => true,
    };
    let must = definition.settings.must_have(definition.factory);
    if must.iter().all(has) { Ok(answer) } else { Err(unreadable("incomplete")) }
}

const fn unreadable(reason: &'static str) -> TokenFailure {
    let class = crate::upstream::Class::Protocol;
    TokenFailure { class, code: None, status: None, retry_after: None, reason, was_sent: true }
}

impl ParkedTokens {
    fn new(brought: &Brought) -> Self {
        let text = |secret: &SecretString| secret.expose_secret().to_owned();
        Self {
            access_token: text(&brought.access_token),
            refresh_token: brought.refresh_token.as_ref().map(text),
            id_token: brought.id_token.as_ref().map(text),
            scope: brought.scope.clone(),
            token_type: brought.token_type.clone(),
            expires_at: brought.expires_at,
            issued_at: brought.issued_at,
        }
    }

    fn into_brought(self) -> Brought {
        Brought {
            access_token: self.access_token.into(),
            refresh_token: self.refresh_token.map(SecretString::from),
            id_token: self.id_token.map(SecretString::from),
            scope: self.scope,
            token_type: self.token_type,
            expires_at: self.expires_at,
            issued_at: self.issued_at,
        }
    }
}
