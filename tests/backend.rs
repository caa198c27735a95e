//! What `src/seal/backend.rs` promises, rule by rule, on every device that Lacre is tried on.
//!
//! There is ONE list of rules (the macro `suite`) and ONE line for each device (`backends!`). Rules go
//! through the public API of `seal` only and know no device by name: what a device cannot do they take
//! from `Device::capabilities`, and what it does wrongly stands in its `Backend::deviations`, with the
//! reason. To add a device write an `on_*.rs` with its `BACKEND`, and its line below.
//!
//! A module is initialised once for a process, so the rules of one device take turns.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    clippy::disallowed_methods,
    clippy::disallowed_types,
    unreachable_pub,
    reason = "a test fails by panicking"
)]

#[path = "support/softhsm.rs"]
mod softhsm_token;

#[path = "support/swtpm.rs"]
mod swtpm;

#[path = "backend/stage.rs"]
mod stage;

#[path = "backend/on_kryoptic.rs"]
mod on_kryoptic;
#[path = "backend/on_nss.rs"]
mod on_nss;
#[path = "backend/on_opencryptoki.rs"]
mod on_opencryptoki;
#[path = "backend/on_softhsm.rs"]
mod on_softhsm;
#[path = "backend/on_tpm.rs"]
mod on_tpm;

#[path = "backend/keys.rs"]
mod keys;
#[path = "backend/load.rs"]
mod load;
#[path = "backend/openssl.rs"]
mod openssl;
#[path = "backend/signing.rs"]
mod signing;
#[path = "backend/table.rs"]
mod table;
#[path = "backend/values.rs"]
mod values;

/// The rules. `alone` are those that look at the whole process.
macro_rules! suite {
    ($name:ident, $home:ident :: $backend:ident) => {
        suite! { @ $name, $home :: $backend,
            shared:
                keys::a_key_made_twice_is_one_key_and_destroying_it_twice_succeeds,
                keys::a_fresh_key_breaks_no_rule,
                keys::the_listed_deviations_are_there_and_no_others,
                keys::a_kind_of_key_that_the_device_lacks_is_refused_by_name,
                keys::a_key_survives_closing_and_opening_the_device,
                keys::another_key_under_the_same_id_is_unfit,
                keys::a_key_that_was_only_planned_is_never_made_by_using_it,
                values::values_of_every_size_come_back,
                values::another_place_is_rejected,
                values::another_kek_or_version_is_rejected,
                values::a_turned_bit_is_rejected,
                values::the_same_value_never_gives_the_same_bytes,
                values::a_rewrap_moves_the_key_and_leaves_the_payload,
                values::every_way_of_wrapping_that_is_offered_keeps_the_promises,
                signing::signatures_have_the_jose_form_and_foreign_code_accepts_them,
                signing::a_mac_depends_on_key_and_message_and_nothing_else,
                load::sixty_four_operations_of_all_kinds_at_once;
            alone:
                load::opening_and_closing_leaves_nothing_behind;
        }
    };
    (@ $name:ident, $home:ident :: $backend:ident,
        shared: $($of:ident :: $rule:ident),*; alone: $($alone_of:ident :: $alone:ident),*;) => {
        mod $name {
            $(
                #[tokio::test]
                async fn $rule() {
                    let name = concat!(stringify!($name), "::", stringify!($rule));
                    if crate::stage::in_own_process(&crate::$home::$backend, name) {
                        return;
                    }
                    let (_beside, stage) = (crate::stage::beside_others().await, crate::stage::of(&crate::$home::$backend).await);
                    crate::$of::$rule(&stage).await;
                }
            )*
            $(
                #[tokio::test]
                async fn $alone() {
                    let name = concat!(stringify!($name), "::", stringify!($alone));
                    if crate::stage::in_own_process(&crate::$home::$backend, name) {
                        return;
                    }
                    let (_alone, stage) = (crate::stage::alone().await, crate::stage::of(&crate::$home::$backend).await);
                    crate::$alone_of::$alone(&stage).await;
                }
            )*
        }
    };
}

/// One line a device: the name of its tests, and its `Backend`.
macro_rules! backends {
    ($($name:ident => $home:ident :: $backend:ident),* $(,)?) => {
        $(suite! { $name, $home :: $backend })*

        /// All of them, in the table's order.
        const BACKENDS: &[&stage::Backend] = &[$(&$home::$backend),*];
    };
}

backends! {
    softhsm => on_softhsm::BACKEND,
    kryoptic => on_kryoptic::BACKEND,
    nss => on_nss::BACKEND,
    opencryptoki => on_opencryptoki::BACKEND,
    tpm => on_tpm::BACKEND,
}

#[tokio::test]
async fn the_readme_says_what_was_measured() {
    let _beside = stage::beside_others().await;
    table::the_readme_says_what_was_measured(BACKENDS).await;
}
