//! The tables as diesel sees them: kept by hand, equal on both engines (a test compares).
//! Owners: vault (`tenants`, `keks`, `secrets`, `secret_versions`, `jobs`, `idempotency_keys`, `installation`), audit
//! (`audit_head`, `audit_records`), keys (`signing_keys`, `signing_rings`, `signing_key_tokens`,
//! `clock_marks`), tokens (`users`, `user_identities`, `connectors`, `token_sets`, `verification_records`,
//! `account_centers`), issuer (`applications`, `user_tokens`),
//! this module (`turns`).

#![expect(missing_docs, reason = "diesel's macro makes undocumented items; migrations document the columns")]

diesel::table! {
    tenants (id) { id -> Text, created_at -> BigInt, }
}

diesel::table! {
    keks (tenant_id, version) {
        tenant_id -> Text,
        version -> BigInt,
        kek_id -> Binary,
        key_ref -> Binary,
        state -> Text,
        wraps_reserved -> BigInt,
        created_at -> BigInt,
        activated_at -> Nullable<BigInt>,
        destroyed_at -> Nullable<BigInt>,
        device -> Text,
        role -> Text,
    }
}

diesel::table! {
    secrets (id) {
        id -> Text,
        tenant_id -> Text,
        name -> Text,
        kind -> Text,
        labels -> Text,
        current_version -> BigInt,
        expires_at -> Nullable<BigInt>,
        created_at -> BigInt,
        updated_at -> BigInt,
        row_version -> BigInt,
    }
}

diesel::table! {
    secret_versions (secret_id, version) {
        secret_id -> Text,
        version -> BigInt,
        tenant_id -> Text,
        encoding -> Text,
        value_len -> BigInt,
        kek_version -> BigInt,
        wrapped_dek -> Binary,
        iv -> Binary,
        ciphertext -> Binary,
        tag -> Binary,
        created_at -> BigInt,
        backup_dek -> Nullable<Binary>,
        backup_kek -> BigInt,
        kind -> Text,
    }
}

diesel::table! {
    jobs (id) {
        id -> Text,
        tenant_id -> Text,
        kind -> Text,
        state -> Text,
        target -> BigInt,
        total -> BigInt,
        done -> BigInt,
        failed -> BigInt,
        position -> Text,
        last_error -> Nullable<Text>,
        lease_owner -> Nullable<Text>,
        lease_until -> BigInt,
        lease_epoch -> BigInt,
        created_at -> BigInt,
        updated_at -> BigInt,
    }
}

diesel::table! {
    idempotency_keys (tenant_id, principal, key) {
        tenant_id -> Text,
        principal -> Text,
        key -> Text,
        operation -> Text,
        body_mac -> Binary,
        result_id -> Text,
        expires_at -> BigInt,
    }
}

diesel::table! {
    audit_head (id) { id -> BigInt, seq -> BigInt, hash -> Binary, }
}

diesel::table! {
    audit_records (seq) {
        seq -> BigInt,
        at -> BigInt,
        tenant_id -> Text,
        action -> Text,
        body -> Text,
    }
}

diesel::table! {
    signing_keys (id) {
        id -> Text,
        tenant_id -> Text,
        purpose -> Text,
        alg -> Text,
        key_ref -> Binary,
        kid -> Nullable<Text>,
        jwk -> Nullable<Text>,
        state -> Text,
        created_at -> BigInt,
        activated_at -> Nullable<BigInt>,
        device -> Text,
        choice -> Nullable<Text>,
        origin -> Text,
        grace -> BigInt,
        published_at -> Nullable<BigInt>,
        effective_at -> Nullable<BigInt>,
        signs_from -> Nullable<BigInt>,
        signs_until -> Nullable<BigInt>,
        longest -> BigInt,
        margin -> BigInt,
        is_leaving -> BigInt,
        ended -> Nullable<Text>,
    }
}

diesel::table! {
    signing_rings (tenant_id, purpose) {
        tenant_id -> Text,
        purpose -> Text,
        version -> BigInt,
        policy -> Text,
    }
}

diesel::table! {
    signing_key_tokens (key_id, expires_at) { key_id -> Text, expires_at -> BigInt, tokens -> BigInt, }
}

diesel::table! {
    clock_marks (id) { id -> BigInt, high -> BigInt, doubt -> BigInt, lag -> BigInt, doubt_until -> BigInt, }
}

diesel::table! {
    installation (id) { id -> BigInt, quarantined_at -> Nullable<BigInt>, }
}

diesel::table! {
    applications (client_id) {
        client_id -> Text,
        tenant_id -> Text,
        name -> Text,
        kind -> Text,
        secret_mac -> Binary,
        scopes -> Text,
        settings -> Text,
        created_at -> BigInt,
        row_version -> BigInt,
    }
}

diesel::table! {
    users (tenant_id, id) {
        tenant_id -> Text,
        id -> Text,
        username -> Nullable<Text>,
        primary_email -> Nullable<Text>,
        primary_phone -> Nullable<Text>,
        name -> Nullable<Text>,
        avatar -> Nullable<Text>,
        profile -> Text,
        custom_data -> Text,
        password_hash -> Nullable<Text>,
        is_suspended -> BigInt,
        created_at -> BigInt,
        updated_at -> BigInt,
    }
}

diesel::table! {
    user_identities (tenant_id, user_id, family, target) {
        tenant_id -> Text,
        user_id -> Text,
        family -> Text,
        target -> Text,
        id -> Text,
        issuer -> Nullable<Text>,
        identity_id -> Text,
        details -> Text,
        created_at -> BigInt,
        updated_at -> BigInt,
    }
}

diesel::table! {
    connectors (tenant_id, id) {
        tenant_id -> Text,
        id -> Text,
        family -> Text,
        factory -> Text,
        target -> Text,
        shown -> Text,
        stores_tokens -> BigInt,
        refresh_ahead -> BigInt,
        version -> BigInt,
        breaker_until -> BigInt,
        breaker_reason -> Nullable<Text>,
        breaker_failures -> BigInt,
        created_at -> BigInt,
        updated_at -> BigInt,
    }
}

diesel::table! {
    token_sets (tenant_id, id) {
        tenant_id -> Text,
        id -> Text,
        user_id -> Text,
        family -> Text,
        target -> Text,
        connector_id -> Text,
        issuer -> Nullable<Text>,
        identity_id -> Text,
        has_refresh_token -> BigInt,
        scope -> Nullable<Text>,
        token_type -> Nullable<Text>,
        expires_at -> Nullable<BigInt>,
        issued_at -> BigInt,
        version -> BigInt,
        state -> Text,
        epoch -> BigInt,
        lease_until -> BigInt,
        spent -> BigInt,
        failures -> BigInt,
        last_error -> Nullable<Text>,
        retry_at -> BigInt,
        refresh_at -> Nullable<BigInt>,
        created_at -> BigInt,
        updated_at -> BigInt,
    }
}

diesel::table! {
    verification_records (tenant_id, id) {
        tenant_id -> Text,
        id -> Text,
        user_id -> Text,
        kind -> Text,
        connector_id -> Nullable<Text>,
        target -> Nullable<Text>,
        state -> Text,
        version -> BigInt,
        expires_at -> BigInt,
    }
}

diesel::table! {
    account_centers (tenant_id) {
        tenant_id -> Text,
        version -> BigInt,
    }
}

diesel::table! {
    user_tokens (hash) {
        hash -> Binary,
        tenant_id -> Text,
        kind -> Text,
        user_id -> Text,
        client_id -> Nullable<Text>,
        scopes -> Text,
        expires_at -> BigInt,
        mac -> Binary,
    }
}

diesel::table! {
    turns (name) { name -> Text, }
}

diesel::allow_tables_to_appear_in_same_query!(secrets, secret_versions, keks, tenants);
diesel::allow_tables_to_appear_in_same_query!(token_sets, connectors);
