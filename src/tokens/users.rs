//! People: made, found, changed, deleted by administrators.

use std::time::Duration;

use serde_json::{Value, json};

use super::model::{Identity, NewUser, User, UserPage, UserPatch, UserQuery};
use super::store::users::{self as store, Account};
use super::store::{sets, verifications};
use super::{Tokens, TokensError, invalid, password};
use crate::audit::{Action, Event};
use crate::db::{Conn, DbError};
use crate::identity::{Caller, Scope};
use crate::ids::{TenantId, UserId};

/// Users on one page.
const PAGE: u64 = 100;

impl Tokens {
    /// Makes a user.
    ///
    /// # Errors
    /// [`TokensError::Forbidden`], [`TokensError::Invalid`], [`TokensError::Taken`].
    pub async fn create_user(&self, caller: &Caller, new: NewUser) -> Result<User, TokensError> {
        let id = UserId::generate();
        let event = Event::new(Action::UserCreate, "user", id.as_str());
        self.audited(caller, Scope::UsersAdmin, event, |_| async move {
            let now = self.now();
            let object = |value: Option<Value>| value.unwrap_or_else(|| json!({}));
            let user = User {
                id,
                username: new.username,
                primary_email: new.primary_email,
                primary_phone: new.primary_phone,
                name: new.name,
                avatar: new.avatar,
                profile: object(new.profile),
                custom_data: object(new.custom_data),
                has_password: new.password.is_some(),
                is_suspended: false,
                created_at: now,
                updated_at: now,
            };
            check(&user)?;
            let password_hash = self.hashed(new.password).await?;
            let (tenant, account) = (caller.tenant.clone(), Account { user, password_hash });
            let row = account.clone();
            let work = move |conn: &mut Conn| store::insert(conn, &tenant, &row);
            match self.parts().db.write::<_, DbError, _>(work).await {
                Ok(()) => Ok(account.user),
                Err(error) => Err(self.taken(&caller.tenant, account.user, error).await),
            }
        })
        .await
    }

    async fn hashed(&self, new: Option<secrecy::SecretString>) -> Result<Option<String>, TokensError> {
        let Some(new) = new else { return Ok(None) };
        let _place = self.inner.tries.at_once.acquire().await;
        self.parts().db.read(move |_| password::hash(&new)).await.map(Some)
    }

    /// A user with the identities.
    ///
    /// # Errors
    /// [`TokensError::NotFound`].
    pub async fn user(&self, caller: &Caller, id: &UserId) -> Result<(User, Vec<Identity>), TokensError> {
        self.may(caller, Scope::UsersAdmin, Action::UserRead)?;
        let (account, identities) = self.account(&caller.tenant, id).await?;
        Ok((account.user, identities))
    }

    pub(super) async fn account(
        &self,
        tenant: &TenantId,
        id: &UserId,
    ) -> Result<(Account, Vec<Identity>), TokensError> {
        let (tenant, id) = (tenant.clone(), id.clone());
        let read = move |conn: &mut Conn| {
            let Some(account) = store::find(conn, &tenant, &id)? else { return Ok(None) };
            Ok::<_, DbError>(Some((account, store::identities(conn, &tenant, &id)?)))
        };
        self.parts().db.read(read).await?.ok_or(TokensError::NotFound("user"))
    }

    /// Whether a user is there and not suspended: for whoever accepts the user's tokens.
    ///
    /// # Errors
    /// If the database does not answer.
    pub async fn is_active_user(&self, tenant: &TenantId, id: &UserId) -> Result<bool, TokensError> {
        let (tenant, id) = (tenant.clone(), id.clone());
        let read = move |conn: &mut Conn| store::is_active(conn, &tenant, &id);
        Ok(self.parts().db.read::<_, DbError, _>(read).await?)
    }

    /// A page of users, newest first.
    ///
    /// # Errors
    /// [`TokensError::Forbidden`], [`TokensError::Invalid`].
    pub async fn users(&self, caller: &Caller, query: UserQuery) -> Result<UserPage, TokensError> {
        self.may(caller, Scope::UsersAdmin, Action::UserRead)?;
        if query.search.as_deref().is_some_and(|text| text.len() > 256 || text.chars().any(char::is_control))
        {
            return Err(invalid("search", "must have at most 256 characters, no control characters"));
        }
        if query.page == 0 || !(1..=PAGE).contains(&query.page_size) {
            return Err(invalid("page_size", format!("pages begin with 1 and have 1 to {PAGE} users")));
        }
        let tenant = caller.tenant.clone();
        let read = move |conn: &mut Conn| {
            let (accounts, total) = store::list(conn, &tenant, &query)?;
            let ids: Vec<_> = accounts.iter().map(|account| account.user.id.clone()).collect();
            Ok::<_, DbError>((accounts, store::identities_of(conn, &tenant, &ids)?, total))
        };
        let (accounts, identities, total) = self.parts().db.read(read).await?;
        let of = |user: &UserId| identities.iter().filter(|one| one.user == *user).cloned().collect();
        let users = accounts.into_iter().map(|account| (of(&account.user.id), account.user));
        Ok(UserPage { users: users.map(|(identities, user)| (user, identities)).collect(), total })
    }

    /// Changes a user.
    ///
    /// # Errors
    /// [`TokensError::NotFound`], [`TokensError::Invalid`], [`TokensError::Taken`].
    pub async fn update_user(
        &self,
        caller: &Caller,
        id: &UserId,
        patch: UserPatch,
    ) -> Result<(User, Vec<Identity>), TokensError> {
        let event = Event::new(Action::UserUpdate, "user", id.as_str());
        self.audited(caller, Scope::UsersAdmin, event, |note| async move {
            let (mut account, identities) = self.account(&caller.tenant, id).await?;
            let before = account.user.updated_at;
            note.add("members", members(&patch));
            if let Some(hash) = self.hashed(patch.password).await? {
                account.password_hash = Some(hash);
            }
            let user = &mut account.user;
            let set = |place: &mut Option<String>, new: Option<Option<String>>| {
                if let Some(new) = new {
                    *place = new;
                }
            };
            set(&mut user.username, patch.username);
            set(&mut user.primary_email, patch.primary_email);
            set(&mut user.primary_phone, patch.primary_phone);
            set(&mut user.name, patch.name);
            set(&mut user.avatar, patch.avatar);
            user.profile = patch.profile.unwrap_or_else(|| user.profile.clone());
            user.custom_data = patch.custom_data.unwrap_or_else(|| user.custom_data.clone());
            user.is_suspended = patch.is_suspended.unwrap_or(user.is_suspended);
            user.has_password = account.password_hash.is_some();
            // Never the same twice: by it a change knows that it was overtaken.
            user.updated_at = self.now().max(before.plus(Duration::from_micros(1)));
            check(user)?;
            let (tenant, row) = (caller.tenant.clone(), account.clone());
            let work = move |conn: &mut Conn| store::update(conn, &tenant, &row, before);
            match self.parts().db.write::<_, DbError, _>(work).await {
                Ok(true) => Ok((account.user, identities)),
                // Changed or deleted by somebody else meanwhile.
                Ok(false) => Err(TokensError::Busy),
                Err(error) => Err(self.taken(&caller.tenant, account.user, error).await),
            }
        })
        .await
    }

    /// Which unique member it is that somebody else has.
    async fn taken(&self, tenant: &TenantId, user: User, error: DbError) -> TokensError {
        if !matches!(error, DbError::Duplicate) {
            return error.into();
        }
        let tenant = tenant.clone();
        let look = move |conn: &mut Conn| store::taken(conn, &tenant, &user);
        match self.parts().db.read::<_, DbError, _>(look).await {
            Ok(which) => TokensError::Taken(which.unwrap_or("id")),
            Err(error) => error.into(),
        }
    }

    /// Deletes a user with identities, proofs and token sets.
    ///
    /// # Errors
    /// [`TokensError::NotFound`].
    pub async fn delete_user(&self, caller: &Caller, id: &UserId) -> Result<(), TokensError> {
        let event = Event::new(Action::UserDelete, "user", id.as_str());
        self.audited(caller, Scope::UsersAdmin, event, |note| async move {
            let grants = self.grants_of_user(caller, id).await?;
            let (tenant, id) = (caller.tenant.clone(), id.clone());
            let work = move |conn: &mut Conn| {
                // The user first: whoever links an account now waits, and then finds nobody.
                let found = store::delete(conn, &tenant, &id)?;
                let gone = sets::of_user(conn, &tenant, &id)?;
                for set in &gone {
                    sets::delete(conn, &tenant, set)?;
                }
                let which = verifications::Which::OfUser(id.clone(), None);
                while verifications::purge(conn, &tenant, &which, 500)? == 500 {}
                Ok::<_, DbError>((found, gone))
            };
            let (found, gone) = self.parts().db.write(work).await?;
            note.add("token_sets", gone.len().to_string());
            self.deleted(caller, gone, grants, "user-deleted");
            found.then_some(()).ok_or(TokensError::NotFound("user"))
        })
        .await
    }
}

/// Names what a patch touches; no values.
fn members(patch: &UserPatch) -> String {
    let touched = [
        ("username", patch.username.is_some()),
        ("primary_email", patch.primary_email.is_some()),
        ("primary_phone", patch.primary_phone.is_some()),
        ("name", patch.name.is_some()),
        ("avatar", patch.avatar.is_some()),
        ("profile", patch.profile.is_some()),
        ("custom_data", patch.custom_data.is_some()),
        ("password", patch.password.is_some()),
        ("is_suspended", patch.is_suspended.is_some()),
    ];
    let names: Vec<_> = touched.into_iter().filter(|(_, is)| *is).map(|(name, _)| name).collect();
    names.join(" ")
}

pub(super) fn check(user: &User) -> Result<(), TokensError> {
    type Rule = (&'static str, fn(&str) -> bool, &'static str);
    let rules: [(&Option<String>, Rule); 5] = [
        (
            &user.username,
            ("username", is_username, "letters, digits and _, not beginning with a digit, at most 128"),
        ),
        (&user.primary_email, ("primaryEmail", is_email, "an e-mail address of at most 128 characters")),
        (&user.primary_phone, ("primaryPhone", is_phone, "digits with country code, at most 32")),
        (&user.name, ("name", is_short, "at most 128 characters, no control characters")),
        (&user.avatar, ("avatar", is_url, "an http or https address of at most 2048 characters")),
    ];
    for (value, (member, is_good, rule)) in rules {
        if value.as_deref().is_some_and(|value| !is_good(value)) {
            return Err(invalid(member, format!("must be {rule}")));
        }
    }
    for (member, value) in [("profile", &user.profile), ("customData", &user.custom_data)] {
        if !value.is_object() || value.to_string().len() > 32 << 10 {
            return Err(invalid(member, "must be an object of at most 32 KiB"));
        }
    }
    Ok(())
}

fn is_username(text: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || c == '_';
    text.len() <= 128 && text.chars().all(allowed) && text.chars().next().is_some_and(|c| !c.is_ascii_digit())
}

fn is_email(text: &str) -> bool {
    let parts = text.split_once('@').is_some_and(|(name, host)| !name.is_empty() && host.contains('.'));
    let bad = |c: char| c.is_whitespace() || c.is_control();
    parts && text.len() <= 128 && !text.chars().any(bad) && text.matches('@').count() == 1
}

fn is_phone(text: &str) -> bool {
    (1..=32).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit())
}

fn is_short(text: &str) -> bool {
    text.chars().count() <= 128 && !text.chars().any(char::is_control)
}

fn is_url(text: &str) -> bool {
    let web = |url: url::Url| matches!(url.scheme(), "http" | "https");
    text.len() <= 2048 && url::Url::parse(text).is_ok_and(web)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_addresses_and_numbers_have_a_form() {
        for (good, text) in
            [(true, "ana"), (true, "_a1"), (false, ""), (false, "1a"), (false, "a b"), (false, "á")]
        {
            assert_eq!(is_username(text), good, "{text}");
        }
        for (good, text) in [
            (true, "a@b.c"),
            (false, "a"),
            (false, "@b.c"),
            (false, "a@b"),
            (false, "a@b@c.d"),
            (false, "a b@c.d"),
        ] {
            assert_eq!(is_email(text), good, "{text}");
        }
        assert!(is_phone("5511999990000") && !is_phone("+55") && !is_phone(""));
        assert!(is_url("https://a.example/p.png") && !is_url("javascript:alert(1)"));
    }
}
