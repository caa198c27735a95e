//! What administrators do with signing and cookie keys: list, rotate, cancel, revert, delete, revoke, import,
//! set the policy.

use secrecy::SecretString;

use super::model::{Change, ImportAs, KeyView, Policy, PolicyPatch, Rotation, Use};
use super::{Keys, KeysError};
use crate::identity::Caller;
use crate::ids::SigningKeyId;

impl Keys {
    /// The ring's keys in the order Next, Current, Previous (newest first).
    ///
    /// # Errors
    /// [`KeysError::Forbidden`] without `signing-keys:admin`.
    pub async fn list(&self, caller: &Caller, used: Use) -> Result<Vec<KeyView>, KeysError> {
        let _ = (caller, used);
        Err(KeysError::NoSigner)
    }

    /// Makes a new key on the device and publishes it. Called Current at once, or after its grace; it signs
    /// when every verifier can know it, which the answer tells.
    ///
    /// # Errors
    /// [`KeysError::Refused`], [`KeysError::Invalid`], [`KeysError::Quarantined`], [`KeysError::Forbidden`].
    pub async fn rotate(&self, caller: &Caller, used: Use, order: Rotation) -> Result<Change, KeysError> {
        let _ = (caller, used, order);
        Err(KeysError::NoSigner)
    }

    /// Cancels the pending Next key.
    ///
    /// # Errors
    /// [`KeysError::Refused`] if there is none.
    pub async fn cancel(&self, caller: &Caller, used: Use, dry_run: bool) -> Result<Change, KeysError> {
        let _ = (caller, used, dry_run);
        Err(KeysError::NoSigner)
    }

    /// Takes the previous key back into use.
    ///
    /// # Errors
    /// [`KeysError::Refused`] if there is none, or while a Next key is pending.
    pub async fn revert(&self, caller: &Caller, used: Use, dry_run: bool) -> Result<Change, KeysError> {
        let _ = (caller, used, dry_run);
        Err(KeysError::NoSigner)
    }

    /// Deletes a key; what it signed is not valid any more.
    ///
    /// # Errors
    /// [`KeysError::Refused`] in the contract's order.
    pub async fn delete(
        &self,
        caller: &Caller,
        used: Use,
        id: &SigningKeyId,
        dry_run: bool,
    ) -> Result<Change, KeysError> {
        let _ = (caller, used, id, dry_run);
        Err(KeysError::NoSigner)
    }

    /// Revokes a key at once, whatever it does. Says how many live tokens die.
    ///
    /// # Errors
    /// [`KeysError::Forbidden`] without `signing-keys:revoke`; [`KeysError::Refused`] for an unknown key.
    pub async fn revoke(
        &self,
        caller: &Caller,
        used: Use,
        id: &SigningKeyId,
        dry_run: bool,
    ) -> Result<Change, KeysError> {
        let _ = (caller, used, id, dry_run);
        Err(KeysError::NoSigner)
    }

    /// Brings a private key (PKCS#8 PEM) into the device; its `kid` stays.
    ///
    /// # Errors
    /// [`KeysError::Invalid`] for what is not such a key.
    pub async fn import(
        &self,
        caller: &Caller,
        pem: SecretString,
        into: ImportAs,
        dry_run: bool,
    ) -> Result<Change, KeysError> {
        let _ = (caller, pem, into, dry_run);
        Err(KeysError::NoSigner)
    }

    /// The ring's rules.
    ///
    /// # Errors
    /// [`KeysError::Forbidden`] without `signing-keys:admin`.
    pub async fn policy(&self, caller: &Caller, used: Use) -> Result<Policy, KeysError> {
        let _ = (caller, used);
        Err(KeysError::NoSigner)
    }

    /// Changes the ring's rules.
    ///
    /// # Errors
    /// [`KeysError::Invalid`] names the member that is out of range.
    pub async fn set_policy(
        &self,
        caller: &Caller,
        used: Use,
        patch: PolicyPatch,
    ) -> Result<Policy, KeysError> {
        let _ = (caller, used, patch);
        Err(KeysError::NoSigner)
    }
}
