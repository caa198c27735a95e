//! Ciphertext that the caller keeps: data keys, seal, open. Nothing of it is stored.

use futures_util::stream::{self, StreamExt};
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

use crate::audit::{Action, Event, Note, Pending};
use crate::identity::{Caller, Scope};
use crate::seal::{Context, SealError, Sealed};

use super::model::{DataKey, ExternalContext, OpenItem, Plain, SealItem};
use super::{Vault, VaultError, check};

/// `Context::kind` of everything here: a data key is opened like any other sealed value.
const KIND: &str = "external";
/// Longest text that a record has whole (`docs/formats/audit-v1.md`).
const UNCUT: usize = 256;
/// Items of one batch that are at the device at the same time.
const AT_ONCE: usize = 8;

fn context<'a>(caller: &'a Caller, context: &'a ExternalContext) -> Context<'a> {
    Context { tenant: caller.tenant.as_str(), kind: KIND, record: &context.0, version: 0 }
}

impl Vault {
    /// A fresh data key of 16 to 64 bytes: plaintext once, and sealed for `context`.
    ///
    /// # Errors
    /// [`VaultError::Invalid`], or what the device and the log say.
    pub async fn data_key(
        &self,
        caller: &Caller,
        context: &ExternalContext,
        len: usize,
    ) -> Result<DataKey, VaultError> {
        let event = event(Action::DataKeyCreate, context);
        self.audited(caller, Scope::CryptoUse, event, |note| async move {
            check::context(context)?;
            check::data_key_len(len)?;
            let plain = Plain(self.parts().sealer.random(len).await.map_err(VaultError::Seal)?);
            // Sealing waits for the device, and guarded memory is not readable across a wait.
            let copy = Zeroizing::new(plain.with(<[u8]>::to_vec));
            let sealed = self.seal_one(caller, context, &copy, &note).await?;
            Ok(DataKey { plain, sealed })
        })
        .await
    }

    /// Seals values whose ciphertext the caller keeps, one result per item, at most 100 items.
    ///
    /// # Errors
    /// [`VaultError::Forbidden`], [`VaultError::Invalid`] for too many items, or what the log says;
    /// everything else is a result of its item.
    pub async fn seal_external(
        &self,
        caller: &Caller,
        items: Vec<SealItem>,
    ) -> Result<Vec<Result<Vec<u8>, VaultError>>, VaultError> {
        let contexts = items.iter().map(|item| &item.context);
        let intents = self.intents(caller, Action::SealExternal, contexts).await?;
        let seal = |(item, intent): (SealItem, Pending)| {
            intent.run(|note| async move {
                check::context(&item.context)?;
                let limit = self.parts().config.max_value_bytes;
                if item.value.bytes.len() > limit {
                    return Err(VaultError::TooLarge { limit });
                }
                self.seal_one(caller, &item.context, &item.value.bytes, &note).await
            })
        };
        Ok(stream::iter(items.into_iter().zip(intents)).map(seal).buffered(AT_ONCE).collect().await)
    }

    /// Opens what [`Vault::seal_external`] or [`Vault::data_key`] made, one result per item, at most 100 items.
    /// Each value is given to `render` as soon as it is open: a batch that kept its values would take
    /// more guarded memory than there is, and batches would wait for each other's.
    ///
    /// # Errors
    /// As [`Vault::seal_external`]; a wrong context is [`VaultError::DoesNotOpen`] of its item.
    pub async fn open_external<T>(
        &self,
        caller: &Caller,
        items: Vec<OpenItem>,
        render: impl Fn(&Plain) -> T,
    ) -> Result<Vec<Result<T, VaultError>>, VaultError> {
        let contexts = items.iter().map(|item| &item.context);
        let intents = self.intents(caller, Action::OpenExternal, contexts).await?;
        let render = &render;
        let open = |(item, intent): (OpenItem, Pending)| {
            intent.run(|note| async move {
                let plain = self.open_one(caller, &item, &note).await?;
                Ok(render(&plain))
            })
        };
        Ok(stream::iter(items.into_iter().zip(intents)).map(open).buffered(AT_ONCE).collect().await)
    }

    /// One intent for each item, so that the log names every context of a batch and how it went.
    async fn intents<'a>(
        &self,
        caller: &Caller,
        action: Action,
        contexts: impl ExactSizeIterator<Item = &'a ExternalContext>,
    ) -> Result<Vec<Pending>, VaultError> {
        let count = contexts.len();
        let refused = || Event::new(action, "context", "").detail("items", count.to_string());
        if let Err(missing) = caller.require(Scope::CryptoUse) {
            return self.deny(caller, refused(), missing.into()).await;
        }
        if let Err(error) = check::batch(count) {
            return self.deny(caller, refused(), error).await;
        }
        let events: Vec<_> = contexts.map(|context| event(action, context)).collect();
        Ok(self.parts().audit.begin_all(caller, events).await?)
    }

    async fn seal_one(
        &self,
        caller: &Caller,
        external: &ExternalContext,
        value: &[u8],
        note: &Note,
    ) -> Result<Vec<u8>, VaultError> {
        let kek = self.kek_for_sealing(&caller.tenant).await?;
        let context = context(caller, external);
        let sealed = self.parts().sealer.seal(&kek, &context, value).await.map_err(VaultError::Seal)?;
        note.add("kek_version", kek.version.to_string());
        Ok(sealed.to_bytes())
    }

    /// A rejection here is no incident: the caller may have mixed up its contexts.
    async fn open_one(&self, caller: &Caller, item: &OpenItem, note: &Note) -> Result<Plain, VaultError> {
        check::context(&item.context)?;
        let sealed = Sealed::from_bytes(&item.sealed).map_err(|_| VaultError::DoesNotOpen)?;
        let kek = self.kek_for_opening(&caller.tenant, sealed.key()).await?.ok_or(VaultError::DoesNotOpen)?;
        note.add("kek_version", kek.version.to_string());
        match self.parts().sealer.open(&kek, &context(caller, &item.context), &sealed).await {
            Ok(opened) => Ok(Plain(opened)),
            Err(SealError::Rejected) => Err(VaultError::DoesNotOpen),
            Err(error) => Err(VaultError::Seal(error)),
        }
    }
}

/// What is no context is not recorded: it may be a value in the wrong place. A record cuts long texts, and
/// two contexts may begin alike: a hash tells them apart.
fn event(action: Action, context: &ExternalContext) -> Event {
    if check::context(context).is_err() {
        return Event::new(action, "context", "");
    }
    let event = Event::new(action, "context", context.0.as_str());
    match context.0.len() {
        0..=UNCUT => event,
        _ => event.detail("context_sha256", hex::encode(Sha256::digest(&context.0))),
    }
}
