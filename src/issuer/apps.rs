//! Applications: made, listed, changed, deleted. An application never gets a right that its maker lacks.

use secrecy::{ExposeSecret, SecretString};
use sha2::{Digest, Sha256};
use url::Url;

use crate::audit::{Action, Event, Outcome};
use crate::db::DbError;
use crate::identity::{Caller, MissingScope, Principal, Scope};
use crate::ids::{ClientId, generate_client_secret};
use crate::issuer::model::{AppExtras, AppInfo, AppPatch, NewApp};
use crate::issuer::store::{self, App};
use crate::issuer::{BadPolicy, Issuer, IssuerError, SigningPolicy};

const NAME_MAX: usize = 128;
const REDIRECT_URIS_MAX: usize = 16;
const URI_MAX: usize = 2048;
const DESCRIPTION_MAX: usize = 1024;
/// What an application may keep for itself, as JSON.
const EXTRAS_MAX: usize = 16 << 10;

impl Issuer {
    /// Makes an application; its secret is in the answer and nowhere else.
    ///
    /// # Errors
    /// [`IssuerError::Invalid`] names the member that breaks a rule; [`IssuerError::Forbidden`] names
    /// the scope that the caller lacks, be it to make applications or to grant it.
    pub async fn create_app(
        &self,
        caller: &Caller,
        new: NewApp,
    ) -> Result<(AppInfo, SecretString), IssuerError> {
        let id = ClientId::generate();
        self.admit(caller, Action::AppCreate, Some(&id))?;
        check(&new.name, &new.redirect_uris, &new.extras)?;
        self.may_grant(caller, &new, &id)?;
        self.may_set(caller, Action::AppCreate, &id, new.signing.as_ref())?;
        // Without randomness nothing can be made now, as without storage.
        let secret = generate_client_secret().map_err(|_| DbError::Unavailable(None))?;
        let event = app_event(Action::AppCreate, &id, &new);
        let app = self.inner.audit.around(caller, event, async |_| {
            let app = self.app(caller, id.clone(), &secret, new).await?;
            let row = app.clone();
            self.inner.db.write(move |conn| store::insert(conn, &row)).await?;
            Ok::<_, IssuerError>(app)
        });
        let app = app.await?;
        self.inner.clients.forget(&app.info.client_id);
        Ok((app.info, secret))
    }

    /// Makes the application of that id, or brings it to this form, with a secret that the caller
    /// chose: for `lacre dev`, whose `dev.json` outlives its runs. Changes nothing where nothing differs.
    ///
    /// # Errors
    /// [`IssuerError::Forbidden`] for everybody but the daemon itself; [`IssuerError::Invalid`] also
    /// if the id belongs to another tenant.
    pub async fn ensure_app(
        &self,
        caller: &Caller,
        id: &ClientId,
        secret: &SecretString,
        new: NewApp,
    ) -> Result<AppInfo, IssuerError> {
        if !matches!(caller.principal, Principal::System(_)) {
            return Err(MissingScope(Scope::AppsAdmin).into());
        }
        check(&new.name, &new.redirect_uris, &new.extras)?;
        let event = app_event(Action::AppCreate, id, &new);
        let mut app = self.app(caller, id.clone(), secret, new).await?;
        let wanted = id.clone();
        let found = self.inner.db.read(move |conn| store::find(conn, &wanted)).await?;
        if let Some(found) = &found {
            app.info.created_at = found.info.created_at;
            // Set by a person since then.
            app.info.signing = app.info.signing.or_else(|| found.info.signing.clone());
            app.info.extras = found.info.extras.clone();
            if same(found, &app) {
                return Ok(app.info);
            }
        }
        let row = app.clone();
        let written = self.inner.audit.around(caller, event, async |_| {
            let update = found.is_some();
            let write = move |conn: &mut _| {
                if update { store::update(conn, &row) } else { store::insert(conn, &row).map(|()| true) }
            };
            Ok::<_, IssuerError>(self.inner.db.write(write).await?)
        });
        if !written.await? {
            return Err(invalid("client_id", "the id belongs to another tenant"));
        }
        self.inner.clients.forget(id);
        Ok(app.info)
    }

    /// Gives an application a new secret, because the key that authenticated the old one was lost: for
    /// `lacre restore`. `false` if the secret is its own already.
    ///
    /// # Errors
    /// [`IssuerError::Forbidden`] for everybody but the daemon itself; [`IssuerError::NotFound`].
    pub async fn reissue(
        &self,
        caller: &Caller,
        id: &ClientId,
        secret: &SecretString,
    ) -> Result<bool, IssuerError> {
        if !matches!(caller.principal, Principal::System(_)) {
            return Err(MissingScope(Scope::AppsAdmin).into());
        }
        let wanted = id.clone();
        let found = self.inner.db.read(move |conn| store::find(conn, &wanted)).await?;
        let mut app = found.filter(|app| app.tenant == caller.tenant).ok_or(IssuerError::NotFound)?;
        let text = secret.expose_secret().as_bytes();
        let secret_mac = self.inner.keys.mac_client_secret(&caller.tenant, id.as_str(), text).await?;
        if app.secret_mac == secret_mac {
            return Ok(false);
        }
        app.secret_mac = secret_mac;
        let event = Event::new(Action::AppReissue, "application", id.as_str());
        let written = self.inner.audit.around(caller, event, async |_| {
            let found = self.inner.db.write(move |conn| store::update(conn, &app)).await?;
            found.then_some(()).ok_or(IssuerError::NotFound)
        });
        written.await?;
        self.inner.clients.forget(id);
        Ok(true)
    }

    /// The tenant's applications.
    ///
    /// # Errors
    /// [`IssuerError::Forbidden`] without `apps:admin`.
    pub async fn list_apps(&self, caller: &Caller) -> Result<Vec<AppInfo>, IssuerError> {
        self.admit(caller, Action::AppList, None)?;
        let tenant = caller.tenant.clone();
        let apps = self.inner.db.read(move |conn| store::list(conn, &tenant)).await?;
        let event = Event::new(Action::AppList, "application", "").detail("count", apps.len().to_string());
        self.inner.audit.record_soon(caller, event, Outcome::Success);
        Ok(apps.into_iter().map(|app| app.info).collect())
    }

    /// One of the tenant's applications.
    ///
    /// # Errors
    /// [`IssuerError::NotFound`]; [`IssuerError::Forbidden`] without `apps:admin`.
    pub async fn find_app(&self, caller: &Caller, id: &ClientId) -> Result<AppInfo, IssuerError> {
        self.admit(caller, Action::AppList, Some(id))?;
        let (tenant, wanted) = (caller.tenant.clone(), id.clone());
        let found = self.inner.db.read(move |conn| store::find(conn, &wanted)).await?;
        let app = found.filter(|app| app.tenant == tenant).ok_or(IssuerError::NotFound)?;
        let event = Event::new(Action::AppList, "application", id.as_str());
        self.inner.audit.record_soon(caller, event, Outcome::Success);
        Ok(app.info)
    }

    /// Changes what an application is called, where its users return to, and whether it may exchange tokens;
    /// here at once and in other daemons within seconds. Neither its kind nor its rights.
    ///
    /// # Errors
    /// [`IssuerError::NotFound`], [`IssuerError::Invalid`]; [`IssuerError::Forbidden`] without `apps:admin`.
    pub async fn update_app(
        &self,
        caller: &Caller,
        id: &ClientId,
        patch: AppPatch,
    ) -> Result<AppInfo, IssuerError> {
        self.admit(caller, Action::AppUpdate, Some(id))?;
        let mut event = Event::new(Action::AppUpdate, "application", id.as_str())
            .detail("members", patch.members().join(" "));
        if let Some(allowed) = patch.allow_token_exchange {
            event = event.detail("allow_token_exchange", allowed.to_string());
        }
        let changed = self.inner.audit.around(caller, event, async |_| {
            let (tenant, id) = (caller.tenant.clone(), id.clone());
            let change = move |conn: &mut _| {
                let found = store::find(conn, &id)?.filter(|app| app.tenant == tenant);
                let mut app = found.ok_or(IssuerError::NotFound)?;
                patch.apply(&mut app.info);
                // As a whole: what a patch adds is bounded together with what is there.
                check(&app.info.name, &app.info.redirect_uris, &app.info.extras)?;
                store::update(conn, &app)?;
                Ok::<_, IssuerError>(app.info)
            };
            self.inner.db.write(change).await
        });
        let changed = changed.await;
        self.inner.clients.forget(id);
        changed
    }

    /// Says what an application may have signed from now on, here at once and in other daemons within seconds.
    /// An empty policy takes it all away.
    ///
    /// # Errors
    /// [`IssuerError::NotFound`], [`IssuerError::Invalid`]; [`IssuerError::Forbidden`] names the scope that the
    /// caller lacks, be it to change applications or to have such things signed.
    pub async fn set_signing_policy(
        &self,
        caller: &Caller,
        id: &ClientId,
        policy: SigningPolicy,
    ) -> Result<Option<SigningPolicy>, IssuerError> {
        let policy = Some(policy).filter(|policy| !policy.is_empty());
        self.admit(caller, Action::AppPolicy, Some(id))?;
        self.may_set(caller, Action::AppPolicy, id, policy.as_ref())?;
        let event = with_policy(Event::new(Action::AppPolicy, "application", id.as_str()), policy.as_ref());
        let changed = self.inner.audit.around(caller, event, async |_| {
            let (tenant, id, signing) = (caller.tenant.clone(), id.clone(), policy.clone());
            let change = move |conn: &mut _| {
                let found = store::find(conn, &id)?.filter(|app| app.tenant == tenant);
                let Some(mut app) = found else { return Ok(false) };
                app.info.signing = signing;
                store::update(conn, &app)
            };
            let found = self.inner.db.write::<_, DbError, _>(change).await?;
            found.then_some(()).ok_or(IssuerError::NotFound)
        });
        let changed = changed.await;
        self.inner.clients.forget(id);
        changed.map(|()| policy)
    }

    /// Deletes an application: its secret and its tokens stop working, here at once and in other
    /// daemons within seconds.
    ///
    /// # Errors
    /// [`IssuerError::NotFound`] if the tenant has no such application.
    pub async fn delete_app(&self, caller: &Caller, id: &ClientId) -> Result<(), IssuerError> {
        self.admit(caller, Action::AppDelete, Some(id))?;
        let event = Event::new(Action::AppDelete, "application", id.as_str());
        let deleted = self.inner.audit.around(caller, event, async |_| {
            let (tenant, id) = (caller.tenant.clone(), id.clone());
            let found = self.inner.db.write(move |conn| store::delete(conn, &tenant, &id)).await?;
            found.then_some(()).ok_or(IssuerError::NotFound)
        });
        let deleted = deleted.await;
        self.inner.clients.forget(id);
        deleted
    }

    async fn app(
        &self,
        caller: &Caller,
        client_id: ClientId,
        secret: &SecretString,
        new: NewApp,
    ) -> Result<App, IssuerError> {
        let secret = secret.expose_secret().as_bytes();
        let secret_mac =
            self.inner.keys.mac_client_secret(&caller.tenant, client_id.as_str(), secret).await?;
        let NewApp { name, kind, scopes, redirect_uris, allow_token_exchange, signing, extras } = new;
        let created_at = self.inner.clock.now();
        let signing = signing.filter(|policy| !policy.is_empty());
        let info = AppInfo {
            client_id,
            name,
            kind,
            scopes,
            redirect_uris,
            allow_token_exchange,
            signing,
            extras,
            created_at,
        };
        Ok(App { info, tenant: caller.tenant.clone(), secret_mac })
    }

    fn admit(&self, caller: &Caller, action: Action, id: Option<&ClientId>) -> Result<(), IssuerError> {
        let Err(missing) = caller.require(Scope::AppsAdmin) else { return Ok(()) };
        self.refuse(caller, action, id, missing)
    }

    fn may_grant(&self, caller: &Caller, new: &NewApp, id: &ClientId) -> Result<(), IssuerError> {
        let lacking = new.scopes.iter().find(|scope| !caller.scopes.contains(*scope));
        match lacking {
            Some(scope) if !matches!(caller.principal, Principal::System(_)) => {
                self.refuse(caller, Action::AppCreate, Some(id), MissingScope(scope))
            }
            _ => Ok(()),
        }
    }

    /// A policy is a part of the right to have things signed: who sets it has that right, and none may speak
    /// for Lacre itself.
    fn may_set(
        &self,
        caller: &Caller,
        action: Action,
        id: &ClientId,
        policy: Option<&SigningPolicy>,
    ) -> Result<(), IssuerError> {
        let Some(policy) = policy else { return Ok(()) };
        for (is_needed, scope) in
            [(policy.has_tokens(), Scope::TokensSign), (policy.has_cookies(), Scope::CookiesSign)]
        {
            if let (true, Err(missing)) = (is_needed, caller.require(scope)) {
                self.refuse(caller, action, Some(id), missing)?;
            }
        }
        match policy.impersonates(&self.inner.config.issuer, &self.inner.api) {
            Some(BadPolicy { field, reason }) => Err(invalid(field, reason)),
            None => Ok(()),
        }
    }

    fn refuse(
        &self,
        caller: &Caller,
        action: Action,
        id: Option<&ClientId>,
        missing: MissingScope,
    ) -> Result<(), IssuerError> {
        let event = Event::new(action, "application", id.map_or("", ClientId::as_str))
            .detail("missing", missing.0.name());
        self.inner.audit.record_soon(caller, event, Outcome::Denied("forbidden"));
        Err(missing.into())
    }
}

fn app_event(action: Action, id: &ClientId, new: &NewApp) -> Event {
    let event = Event::new(action, "application", id.as_str())
        .detail("kind", new.kind.name())
        .detail("scope", new.scopes.to_string());
    match &new.signing {
        Some(policy) => with_policy(event, Some(policy)),
        None => event,
    }
}

/// Names the sections of a policy, and tells policies apart.
fn with_policy(event: Event, policy: Option<&SigningPolicy>) -> Event {
    let Some(policy) = policy else { return event.detail("signing", "none") };
    // Texts and numbers always serialise.
    let text = serde_json::to_vec(policy).unwrap_or_default();
    event.detail("signing", policy.sections()).detail("policy_sha256", hex::encode(Sha256::digest(text)))
}

/// Whether writing `new` over `old` would change nothing.
fn same(old: &App, new: &App) -> bool {
    let told = |app: &App| {
        let AppInfo { name, kind, scopes, redirect_uris, allow_token_exchange, signing, extras, .. } =
            app.info.clone();
        (name, kind, scopes, redirect_uris, allow_token_exchange, signing, extras)
    };
    old.tenant == new.tenant && old.secret_mac == new.secret_mac && told(old) == told(new)
}

fn check(name: &str, redirect_uris: &[String], extras: &AppExtras) -> Result<(), IssuerError> {
    let length = name.chars().count();
    if length == 0 || length > NAME_MAX || name.chars().any(char::is_control) {
        return Err(invalid("name", "1 to 128 characters, no control characters"));
    }
    let returns =
        [("redirect_uris", redirect_uris), ("post_logout_redirect_uris", &extras.post_logout_redirect_uris)];
    for (member, uris) in returns {
        if uris.len() > REDIRECT_URIS_MAX {
            return Err(invalid(member, "at most 16"));
        }
        if !uris.iter().all(|uri| is_redirect_uri(uri)) {
            return Err(invalid(member, "absolute http or https URIs without fragment or password"));
        }
    }
    let described = extras.description.as_ref().map_or(0, |text| text.chars().count());
    if described > DESCRIPTION_MAX {
        return Err(invalid("description", "at most 1024 characters"));
    }
    for (member, object) in
        [("client_metadata", &extras.client_metadata), ("custom_data", &extras.custom_data)]
    {
        if serde_json::to_string(object).map_or(usize::MAX, |text| text.len()) > EXTRAS_MAX {
            return Err(invalid(member, "at most 16 KiB"));
        }
    }
    Ok(())
}

/// RFC 6749, section 3.1.2: absolute and without fragment.
fn is_redirect_uri(text: &str) -> bool {
    let fits = |uri: Url| {
        matches!(uri.scheme(), "http" | "https")
            && uri.fragment().is_none()
            && uri.username().is_empty()
            && uri.password().is_none()
    };
    text.len() <= URI_MAX && Url::parse(text).is_ok_and(fits)
}

fn invalid(field: &'static str, reason: &str) -> IssuerError {
    IssuerError::Invalid { field, reason: reason.to_owned() }
}

#[cfg(test)]
mod tests {
    use serde_json::{Map, json};

    use super::{check, is_redirect_uri};
    use crate::clock::Timestamp;
    use crate::identity::ScopeSet;
    use crate::ids::ClientId;
    use crate::issuer::{AppExtras, AppInfo, AppKind, AppPatch};

    #[test]
    fn only_absolute_web_addresses_are_redirect_uris() {
        for good in ["https://a.example/cb", "http://127.0.0.1:8281/callback", "https://a.example/cb?x=1"] {
            assert!(is_redirect_uri(good), "{good}");
        }
        for bad in
            ["", "/cb", "javascript:alert(1)", "https://a.example/#x", "https://u:p@a.example/", "ftp://a/"]
        {
            assert!(!is_redirect_uri(bad), "{bad}");
        }
    }

    #[test]
    fn a_name_is_short_and_printable() {
        let named = |name: &str| check(name, &[], &AppExtras::default());
        assert!(named("Backup job").is_ok());
        for bad in ["", "a\nb", &"x".repeat(129)] {
            assert!(named(bad).is_err());
        }
    }

    #[test]
    fn what_decides_nothing_is_bounded_too() {
        let extras = AppExtras::default();
        let uris = vec!["ftp://a/".to_owned()];
        let long = Map::from_iter([("a".to_owned(), json!("x".repeat(16 << 10)))]);
        for (bad, member) in [
            (AppExtras { post_logout_redirect_uris: uris, ..extras.clone() }, "post_logout_redirect_uris"),
            (AppExtras { description: Some("x".repeat(1025)), ..extras.clone() }, "description"),
            (AppExtras { custom_data: long.clone(), ..extras.clone() }, "custom_data"),
            (AppExtras { client_metadata: long, ..extras }, "client_metadata"),
        ] {
            let error = check("a", &[], &bad).unwrap_err().to_string();
            assert!(error.starts_with(member), "{error}");
        }
    }

    #[test]
    fn a_patch_changes_what_it_names_and_merges_objects() {
        let object = |text: &str| serde_json::from_str::<Map<_, _>>(text).unwrap();
        let mut app = AppInfo {
            client_id: ClientId::parse("a").unwrap(),
            name: "old".to_owned(),
            kind: AppKind::Traditional,
            scopes: ScopeSet::NONE,
            redirect_uris: vec!["https://a.example/".to_owned()],
            allow_token_exchange: true,
            signing: None,
            extras: AppExtras { custom_data: object(r#"{"a":1,"b":1}"#), ..AppExtras::default() },
            created_at: Timestamp::from_micros(0),
        };
        let patch = AppPatch {
            name: Some("new".to_owned()),
            allow_token_exchange: Some(false),
            custom_data: object(r#"{"b":2,"c":null}"#),
            ..AppPatch::default()
        };
        assert_eq!(patch.members(), ["name", "allow_token_exchange", "custom_data"]);
        patch.apply(&mut app);

        assert_eq!((app.name.as_str(), app.allow_token_exchange), ("new", false));
        assert_eq!(app.redirect_uris.len(), 1);
        assert_eq!(app.extras.custom_data, object(r#"{"a":1,"b":2,"c":null}"#));
    }
}
