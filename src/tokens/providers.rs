//! What is known of each identity provider: a connector's configuration in, decisions out.
//!
//! A [`Factory`] is a kind of connector, under the id that Logto gives it. [`Settings`] is one connector's
//! configuration, checked; it says where to send a user, what to post for a code or a refresh token, and what
//! an answer must have. [`Profile`] is what a provider says of a user, cut down to what may be shown.
//!
//! Pure: no network, no clock, no randomness. Who calls out checks [`Settings::urls`] and every discovered
//! address against the egress rules first. What comes from a provider is hostile text, and so is what
//! an administrator pasted. Start with [`Settings::read`], then `requests.rs`.

mod factories;
mod form;
mod mask;
mod profile;
mod reader;
mod requests;
mod settings;

pub use factories::{
    Factory, Family, Provider, social_factories, social_factory, sso_provider, sso_providers,
};
pub use mask::{MASK, masked, unmasked, without_secrets, would_move_secret};
pub use profile::{BadProfile, Profile, ProfileSource, merged_claims, profile};
pub use reader::{BadConfig, is_scope};
pub use requests::{AuthorizationRequest, Endpoints, facebook_swap};
pub use settings::{AnswerFormat, AuthMethod, HmacAlg, ProfileMap, Settings};
