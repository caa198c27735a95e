//! RSA moduli that a bad generator makes, by what their public half shows (KL-9).
//!
//! Asked once, when a key is made or imported. A modulus that passes may still be weak in ways that nobody sees from
//! outside; one that does not pass can be factored by anybody who has the JWKS. Nothing here is secret.

use num_bigint::BigUint;

/// Below this every prime is tried as a factor.
const SMALL: u32 = 10_000;
/// Steps of Fermat's method. A few are enough for every generator that was found to make primes next to each other
/// (CVE-2022-26320); a key of random primes would need about 2^(bits / 4).
const STEPS: u32 = 256;
/// Where ROCA's primes leave a mark: each is `k * M + 65537^a mod M`, M being the product of the first primes, so modulo each of
/// them it is a power of 65537 (Nemec and others, CCS 2017; CVE-2017-15361).
const MARKED_BELOW: u32 = 168;
const EXPONENT: &[u8] = &[1, 0, 1];

/// What is wrong with an RSA key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WeakRsa {
    /// The public exponent is not 65537.
    #[error("the public exponent is not 65537")]
    Exponent,
    /// The modulus is not 2048, 3072 or 4096 bits long, without leading zeros.
    #[error("the modulus is not exactly 2048, 3072 or 4096 bits long")]
    Length,
    /// A small number divides the modulus.
    #[error("the modulus has a small factor")]
    SmallFactor,
    /// The primes are next to each other (Fermat).
    #[error("the primes of the modulus are too close to each other")]
    ClosePrimes,
    /// The modulus has the fingerprint of ROCA.
    #[error("the modulus has the fingerprint of ROCA (CVE-2017-15361)")]
    Roca,
}

/// Looks at a modulus and an exponent, big endian.
///
/// # Errors
/// [`WeakRsa`]: the key must not be used.
pub fn check_rsa(modulus: &[u8], exponent: &[u8]) -> Result<(), WeakRsa> {
    if exponent != EXPONENT {
        return Err(WeakRsa::Exponent);
    }
    if !matches!(modulus.len(), 256 | 384 | 512) || modulus[0] & 0x80 == 0 {
        return Err(WeakRsa::Length);
    }
    if primes().any(|prime| remainder(modulus, prime) == 0) {
        return Err(WeakRsa::SmallFactor);
    }
    if primes()
        .take_while(|prime| *prime < MARKED_BELOW)
        .all(|prime| is_power(remainder(modulus, prime), prime))
    {
        return Err(WeakRsa::Roca);
    }
    if has_close_primes(&BigUint::from_bytes_be(modulus)) {
        return Err(WeakRsa::ClosePrimes);
    }
    Ok(())
}

/// The first of `others` that has a prime in common with `modulus`, by its place; the same modulus has both. Two keys
/// that share one can be factored by anybody who has both moduli.
pub fn shares_a_prime<'a>(modulus: &[u8], others: impl IntoIterator<Item = &'a [u8]>) -> Option<usize> {
    let modulus = BigUint::from_bytes_be(modulus);
    others.into_iter().position(|other| {
        let (mut a, mut b) = (modulus.clone(), BigUint::from_bytes_be(other));
        while b.bits() > 0 {
            let rest = &a % &b;
            (a, b) = (b, rest);
        }
        a.bits() > 1
    })
}

fn primes() -> impl Iterator<Item = u32> {
    (2..SMALL)
        .filter(|number| (2..100).take_while(|factor| factor * factor <= *number).all(|f| number % f != 0))
}

fn remainder(number: &[u8], by: u32) -> u32 {
    // `by` is below 2^14, so this stays below 2^22.
    number.iter().fold(0, |rest, byte| ((rest << 8) | u32::from(*byte)) % by)
}

/// Whether `number` is a power of 65537 modulo `prime`.
fn is_power(number: u32, prime: u32) -> bool {
    let mut power = 1 % prime;
    loop {
        if power == number {
            return true;
        }
        power = power * (65537 % prime) % prime;
        if power == 1 % prime {
            return false;
        }
    }
}

/// Fermat: `n = a^2 - b^2` with `a` just above the root.
fn has_close_primes(n: &BigUint) -> bool {
    let mut a = n.sqrt();
    if &a * &a < *n {
        a += 1_u32;
    }
    (0..STEPS).any(|_| {
        let rest = &a * &a - n;
        a += 1_u32;
        is_square(&rest)
    })
}

fn is_square(number: &BigUint) -> bool {
    // Most are none modulo one of these, which is sooner told than by a root.
    let may_be = |by: u32| {
        let rest = u32::try_from(number % by).unwrap_or(0);
        (0..by).any(|root| root * root % by == rest)
    };
    [64, 63, 65, 11].into_iter().all(may_be) && {
        let root = number.sqrt();
        &root * &root == *number
    }
}

#[cfg(test)]
mod tests {
    use aws_lc_rs::rsa::{KeyPair, KeySize};
    use aws_lc_rs::signature::KeyPair as _;
    use num_bigint::BigUint;

    use super::{EXPONENT, WeakRsa, check_rsa, is_power, primes, remainder, shares_a_prime};

    /// A number of 1024 bits, the two highest set, without small factors: as good as a prime for these checks.
    fn factor(seed: u32) -> BigUint {
        let spread = BigUint::from(seed) * BigUint::from(0x9e37_79b9_u32).pow(29);
        without_small((BigUint::from(3_u32) << 1022) + spread)
    }

    /// The next number of which no small prime is a factor.
    fn without_small(mut number: BigUint) -> BigUint {
        number.set_bit(0, true);
        while primes().any(|prime| (&number % prime).bits() == 0) {
            number += 2_u32;
        }
        number
    }

    fn bytes(p: &BigUint, q: &BigUint) -> Vec<u8> {
        (p * q).to_bytes_be()
    }

    /// As Infineon's library made its primes, of 1024 bits.
    fn roca_factor(seed: u32) -> BigUint {
        let product = primes().take(126).fold(BigUint::from(1_u32), |product, prime| product * prime);
        let power = BigUint::from(65537_u32).modpow(&BigUint::from(seed), &product);
        let high = (BigUint::from(3_u32) << 1022) / &product + seed;
        high * product + power
    }

    #[test]
    fn keys_of_a_good_generator_pass() {
        let moduli: Vec<Vec<u8>> = [KeySize::Rsa2048, KeySize::Rsa2048, KeySize::Rsa3072, KeySize::Rsa4096]
            .into_iter()
            .map(|size| {
                let pair = KeyPair::generate(size).unwrap();
                let der = pair.public_key().as_ref();
                // SEQUENCE and INTEGER with lengths of two octets, and a zero before the modulus.
                der[9..9 + pair.public_modulus_len()].to_vec()
            })
            .collect();
        for (at, modulus) in moduli.iter().enumerate() {
            assert_eq!(check_rsa(modulus, EXPONENT), Ok(()));
            let others = moduli.iter().enumerate().filter(|(other, _)| *other != at);
            assert_eq!(shares_a_prime(modulus, others.map(|(_, other)| other.as_slice())), None);
        }
    }

    #[test]
    fn a_key_that_can_be_factored_from_its_public_half_is_told_by_its_fault() {
        let (p, q) = (factor(1), factor(1_000_003));
        let good = bytes(&p, &q);
        assert_eq!(check_rsa(&good, EXPONENT), Ok(()));
        let (next, near) = (without_small(&p + 2_u32), without_small(&p + (BigUint::from(1_u32) << 510)));
        let even: Vec<u8> = good[..255].iter().copied().chain([good[255] ^ 1]).collect();
        let table: [(&[u8], &[u8], WeakRsa); 12] = [
            (&good, &[3], WeakRsa::Exponent),
            (&good, &[0, 1, 0, 1], WeakRsa::Exponent),
            (&good, &[1], WeakRsa::Exponent),
            (&[&[0], good.as_slice()].concat(), EXPONENT, WeakRsa::Length),
            (&good[1..], EXPONENT, WeakRsa::Length),
            (&[&[0x7F], &good[1..]].concat(), EXPONENT, WeakRsa::Length),
            (&[], EXPONENT, WeakRsa::Length),
            (&even, EXPONENT, WeakRsa::SmallFactor),
            (&bytes(&p, &next), EXPONENT, WeakRsa::ClosePrimes),
            (&bytes(&p, &near), EXPONENT, WeakRsa::ClosePrimes),
            (&bytes(&p, &p), EXPONENT, WeakRsa::ClosePrimes),
            (&bytes(&roca_factor(7), &roca_factor(99_991)), EXPONENT, WeakRsa::Roca),
        ];
        for (row, (modulus, exponent, fault)) in table.into_iter().enumerate() {
            assert_eq!(check_rsa(modulus, exponent), Err(fault), "row {row}");
        }
        // Fermat's steps are (p - q)^2 / 8 sqrt(n): 2^510 apart is none, 2^600 apart is out of everybody's reach.
        let far = without_small(&p + (BigUint::from(1_u32) << 600));
        assert_eq!(check_rsa(&bytes(&p, &far), EXPONENT), Ok(()));
        // One prime of that library and one of another leave no mark.
        assert!(!matches!(check_rsa(&bytes(&roca_factor(7), &q), EXPONENT), Err(WeakRsa::Roca)));
    }

    #[test]
    fn two_of_fifty_keys_with_a_prime_in_common_are_found() {
        let own: Vec<Vec<u8>> =
            (0..50).map(|at| bytes(&factor(2 * at + 3), &factor(900_000 + 7 * at))).collect();
        let (p, q) = (factor(77_777), factor(888_888));
        let modulus = bytes(&p, &q);
        let list = |moduli: &[Vec<u8>]| shares_a_prime(&modulus, moduli.iter().map(Vec::as_slice));
        assert_eq!(list(&own), None);
        let mut with = own.clone();
        with[41] = bytes(&factor(5), &q);
        assert_eq!(list(&with), Some(41));
        with[7].clone_from(&modulus);
        assert_eq!(list(&with), Some(7), "the same key is no other one");
        assert_eq!(shares_a_prime(&modulus, []), None);
    }

    #[test]
    fn the_arithmetic_is_that_of_the_big_numbers() {
        let number = factor(42);
        for prime in primes() {
            assert_eq!(BigUint::from(remainder(&number.to_bytes_be(), prime)), &number % prime);
        }
        assert_eq!(primes().take(6).collect::<Vec<_>>(), [2, 3, 5, 7, 11, 13]);
        // 65537 is 10 modulo 11, whose powers are 1 and 10.
        let powers: Vec<u32> = (0..11).filter(|number| is_power(*number, 11)).collect();
        assert_eq!(powers, [1, 10]);
    }
}
