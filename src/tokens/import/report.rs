//! What an import has found and done: numbers, reasons, ids. Never a value.

use std::borrow::Cow;
use std::collections::BTreeMap;

use serde::Serialize;

/// So many losses are named by their ids; all are counted.
const NAMED: usize = 1000;

/// What is imported.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Social connectors.
    Connectors,
    /// Enterprise connectors.
    SsoConnectors,
    /// People.
    Users,
    /// Their passwords' hashes.
    Passwords,
    /// Their accounts at social providers.
    Identities,
    /// Their accounts at enterprise providers.
    SsoIdentities,
    /// Secrets: token sets, and what else may be among them.
    TokenSets,
    /// Private keys that sign tokens.
    SigningKeys,
    /// Keys that sign cookies.
    CookieKeys,
}

impl Kind {
    /// All of them, in the order of an import.
    pub const ALL: [Self; 9] = [
        Self::Connectors,
        Self::SsoConnectors,
        Self::Users,
        Self::Passwords,
        Self::Identities,
        Self::SsoIdentities,
        Self::TokenSets,
        Self::SigningKeys,
        Self::CookieKeys,
    ];

    /// The name in reports and records.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Connectors => "connectors",
            Self::SsoConnectors => "sso-connectors",
            Self::Users => "users",
            Self::Passwords => "passwords",
            Self::Identities => "identities",
            Self::SsoIdentities => "sso-identities",
            Self::TokenSets => "token-sets",
            Self::SigningKeys => "signing-keys",
            Self::CookieKeys => "cookie-keys",
        }
    }
}

/// Why something is not imported.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Skip {
    /// In words, with the member's name where there is one.
    pub reason: Cow<'static, str>,
    /// Whether it should have been imported.
    pub is_loss: bool,
}

impl Skip {
    /// Something that should have been imported.
    pub fn loss(reason: impl Into<Cow<'static, str>>) -> Self {
        Self { reason: reason.into(), is_loss: true }
    }

    /// Something that is not imported by design.
    pub fn by_design(reason: impl Into<Cow<'static, str>>) -> Self {
        Self { reason: reason.into(), is_loss: false }
    }
}

/// What becomes of one thing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It was not there.
    Imported,
    /// It was there, and was left as it is.
    Present,
    /// It stays behind.
    Skipped(Skip),
}

impl From<Skip> for Fate {
    fn from(skip: Skip) -> Self {
        Self::Skipped(skip)
    }
}

/// One thing and what becomes of it.
pub(in crate::tokens) struct Told {
    pub(in crate::tokens) kind: Kind,
    pub(in crate::tokens) id: String,
    pub(in crate::tokens) fate: Fate,
}

impl Told {
    pub(in crate::tokens) fn new(kind: Kind, id: &str, fate: impl Into<Fate>) -> Self {
        Self { kind, id: id.to_owned(), fate: fate.into() }
    }
}

/// Numbers of one kind.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// In Logto's database.
    pub found: u64,
    /// Taken over in this run (in a dry run: that would be).
    pub imported: u64,
    /// There already.
    pub present: u64,
    /// Left behind.
    pub skipped: u64,
    /// Why, and how many.
    pub reasons: BTreeMap<String, u64>,
}

/// Something that should have been imported and is not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Loss {
    /// What it is.
    pub kind: Kind,
    /// Its id at Logto.
    pub id: String,
    /// Why.
    pub reason: String,
}

/// What an import has done so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Rows that there are to look at.
    pub total: u64,
    counts: BTreeMap<Kind, Counts>,
    losses: u64,
    named: Vec<Loss>,
}

impl Report {
    pub(in crate::tokens) fn of_rows(total: u64) -> Self {
        Self { total, ..Self::default() }
    }

    /// Adds what became of one thing.
    pub fn add(&mut self, kind: Kind, id: &str, fate: Fate) {
        let counts = self.counts.entry(kind).or_default();
        counts.found += 1;
        match fate {
            Fate::Imported => counts.imported += 1,
            Fate::Present => counts.present += 1,
            Fate::Skipped(Skip { reason, is_loss }) => {
                counts.skipped += 1;
                *counts.reasons.entry(reason.clone().into_owned()).or_default() += 1;
                self.losses += u64::from(is_loss);
                if is_loss && self.named.len() < NAMED {
                    self.named.push(Loss { kind, id: id.to_owned(), reason: reason.into_owned() });
                }
            }
        }
    }

    pub(in crate::tokens) fn add_all(&mut self, told: Vec<Told>) {
        for Told { kind, id, fate } in told {
            self.add(kind, &id, fate);
        }
    }

    /// The numbers of a kind.
    pub fn of(&self, kind: Kind) -> Counts {
        self.counts.get(&kind).cloned().unwrap_or_default()
    }

    /// How many rows were looked at, of [`Report::total`].
    pub fn done(&self) -> u64 {
        let kinds = [Kind::Connectors, Kind::SsoConnectors, Kind::Users, Kind::TokenSets];
        kinds.into_iter().map(|kind| self.counts.get(&kind).map_or(0, |counts| counts.found)).sum()
    }

    /// How many things should have been imported and are not.
    pub const fn losses(&self) -> u64 {
        self.losses
    }

    /// The first of them.
    pub fn named(&self) -> &[Loss] {
        &self.named
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_is_counted_once_and_losses_are_named() {
        let mut report = Report::default();
        report.add(Kind::Users, "a", Fate::Imported);
        report.add(Kind::Users, "b", Fate::Present);
        report.add(Kind::TokenSets, "c", Skip::by_design("of a kind").into());
        for number in 0..=NAMED {
            report.add(Kind::TokenSets, &number.to_string(), Skip::loss("does not decrypt").into());
        }

        let sets = report.of(Kind::TokenSets);
        assert_eq!((sets.found, sets.imported, sets.present, sets.skipped), (1002, 0, 0, 1002));
        assert_eq!(sets.reasons["of a kind"], 1);
        assert_eq!(sets.reasons["does not decrypt"], 1001);
        assert_eq!((report.losses(), report.named().len()), (1001, NAMED));
        assert_eq!((report.named()[0].id.as_str(), report.done()), ("0", 1004));
        assert_eq!(report.of(Kind::Users).found, 2);
        assert_eq!(report.of(Kind::CookieKeys), Counts::default());
    }
}
