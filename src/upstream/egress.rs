//! Where the daemon may connect to.
//!
//! [`Rules::url`] says what can be said without asking the DNS: scheme, user info, port, literal addresses.
//! [`Resolver`] says the rest, at the only moment that counts: it looks a name up, refuses the whole answer if
//! one address in it is forbidden, and the client connects to these addresses and no others. There is no second
//! look-up between check and connect, so an answer that changes (DNS rebinding) gains nothing.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use url::{Host, Url};

use super::{Config, StartError};

/// Why a URL is refused before anything is sent or looked up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadUrl {
    /// Not an absolute URL with a host.
    #[error("not a URL with a host")]
    Syntax,
    /// Another scheme than https.
    #[error("the scheme must be https")]
    Scheme,
    /// A user name or password in it.
    #[error("a URL must not contain a user name or a password")]
    UserInfo,
    /// A fragment, which is never sent.
    #[error("a URL must not have a fragment")]
    Fragment,
    /// A port outside of the list.
    #[error("the port is not allowed")]
    Port,
    /// A literal address that is not allowed, or this host.
    #[error("the address is not allowed")]
    Address,
}

const fn v4(a: u8, b: u8, c: u8, d: u8, length: u8) -> Ipv4Net {
    Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, d), length)
}

/// A network that is given by its first two groups.
const fn v6(first: u16, second: u16, length: u8) -> Ipv6Net {
    Ipv6Net::new_assert(Ipv6Addr::new(first, second, 0, 0, 0, 0, 0, 0), length)
}

/// Networks of somebody's own: reached by a name that is in the allow-list.
const PRIVATE_V4: [Ipv4Net; 4] =
    [v4(10, 0, 0, 0, 8), v4(172, 16, 0, 0, 12), v4(192, 168, 0, 0, 16), v4(100, 64, 0, 0, 10)];
const PRIVATE_V6: Ipv6Net = v6(0xfc00, 0, 7);

/// No provider is here (IANA's special-purpose registry): reached by a network in the allow-list only.
const SPECIAL_V4: [Ipv4Net; 10] = [
    v4(0, 0, 0, 0, 8),       // this network
    v4(127, 0, 0, 0, 8),     // loopback
    v4(169, 254, 0, 0, 16),  // link-local, and the metadata of clouds
    v4(192, 0, 0, 0, 24),    // protocol assignments
    v4(192, 0, 2, 0, 24),    // documentation
    v4(192, 88, 99, 0, 24),  // 6to4 relays
    v4(198, 18, 0, 0, 15),   // benchmarking
    v4(198, 51, 100, 0, 24), // documentation
    v4(203, 0, 113, 0, 24),  // documentation
    v4(224, 0, 0, 0, 3),     // multicast, reserved, broadcast
];

/// What is routed in IPv6, and what is special in it.
const GLOBAL_V6: Ipv6Net = v6(0x2000, 0, 3);
const SPECIAL_V6: [Ipv6Net; 4] = [
    v6(0x2001, 0, 23), // protocol assignments, Teredo (an IPv4 address of anybody's choice) among them
    v6(0x2001, 0x0db8, 32), // documentation
    v6(0x2002, 0, 16), // 6to4: an IPv4 address of anybody's choice
    v6(0x3fff, 0, 20), // documentation
];
/// NAT64 (RFC 6052): the IPv4 address in it is where the connection ends.
const NAT64: Ipv6Net = v6(0x0064, 0xff9b, 96);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reach {
    Public,
    Private,
    Special,
}

fn reach(address: IpAddr) -> Reach {
    let (is_private, is_special) = match address {
        IpAddr::V4(ip) => {
            let within = |nets: &[Ipv4Net]| nets.iter().any(|net| net.contains(&ip));
            (within(&PRIVATE_V4), within(&SPECIAL_V4))
        }
        IpAddr::V6(ip) => {
            let is_special = !GLOBAL_V6.contains(&ip) || SPECIAL_V6.iter().any(|net| net.contains(&ip));
            (PRIVATE_V6.contains(&ip), is_special)
        }
    };
    match (is_private, is_special) {
        (true, _) => Reach::Private,
        (false, true) => Reach::Special,
        (false, false) => Reach::Public,
    }
}

/// The address that a packet ends at: IPv4 in the clothes of IPv6 is IPv4.
fn effective(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V6(ip) if NAT64.contains(&ip) => {
            let [.., a, b, c, d] = ip.octets();
            Ipv4Addr::new(a, b, c, d).into()
        }
        address => address.to_canonical(),
    }
}

/// What `[upstream]` says about destinations.
pub(super) struct Rules {
    nets: Vec<IpNet>,
    /// Names that may have private addresses, and the ports they have beside `ports`.
    names: BTreeMap<String, Vec<u16>>,
    ports: Vec<u16>,
    loopback: bool,
    /// Chosen by the operator, not by a tenant.
    proxy: Option<String>,
}

impl Rules {
    pub(super) fn new(config: &Config, proxy: Option<&Url>) -> Result<Self, StartError> {
        let mut rules = Self {
            nets: Vec::new(),
            names: BTreeMap::new(),
            ports: config.ports.clone(),
            loopback: config.loopback_http,
            proxy: proxy.and_then(Url::host_str).map(str::to_owned),
        };
        for entry in &config.allow {
            rules.allow(entry).ok_or_else(|| StartError::Allow(entry.clone()))?;
        }
        Ok(rules)
    }

    fn allow(&mut self, entry: &str) -> Option<()> {
        if let Ok(net) = entry.parse::<IpNet>().or_else(|_| entry.parse::<IpAddr>().map(IpNet::from)) {
            self.nets.push(net);
            return Some(());
        }
        let (host, port) = match entry.rsplit_once(':') {
            Some((host, port)) => (host, Some(port.parse::<u16>().ok()?)),
            None => (entry, None),
        };
        let Host::Domain(name) = Host::parse(host).ok()? else { return None };
        self.names.entry(without_dot(&name).to_owned()).or_default().extend(port);
        Some(())
    }

    /// Reads a URL and says whether it may be asked, as far as that can be said without the DNS.
    pub(super) fn parse(&self, text: &str) -> Result<Url, BadUrl> {
        let url = Url::parse(text).map_err(|_| BadUrl::Syntax)?;
        self.url(&url).map(|()| url)
    }

    /// Whether a URL may be asked, as far as that can be said without the DNS.
    pub(super) fn url(&self, url: &Url) -> Result<(), BadUrl> {
        let host = url.host().ok_or(BadUrl::Syntax)?;
        if !url.username().is_empty() || url.password().is_some() {
            return Err(BadUrl::UserInfo);
        }
        if url.fragment().is_some() {
            return Err(BadUrl::Fragment);
        }
        if self.loopback && is_this_host(&host) && matches!(url.scheme(), "http" | "https") {
            return Ok(());
        }
        if url.scheme() != "https" {
            return Err(BadUrl::Scheme);
        }
        let port = url.port_or_known_default().unwrap_or_default();
        let is_own = |name: &str| self.names.get(without_dot(name)).is_some_and(|own| own.contains(&port));
        if !self.ports.contains(&port) && !url.domain().is_some_and(is_own) {
            return Err(BadUrl::Port);
        }
        let allowed = match host {
            Host::Domain(_) => !is_this_host(&host),
            Host::Ipv4(ip) => self.address(ip.into(), ""),
            Host::Ipv6(ip) => self.address(ip.into(), ""),
        };
        if allowed { Ok(()) } else { Err(BadUrl::Address) }
    }

    /// Whether `name` may be at `address`; an empty name is in no list.
    fn address(&self, address: IpAddr, name: &str) -> bool {
        let address = effective(address);
        let listed = self.nets.iter().any(|net| net.contains(&address));
        listed
            || match reach(address) {
                Reach::Public => true,
                Reach::Private => self.names.contains_key(name),
                Reach::Special => self.loopback && address.is_loopback() && name == "localhost",
            }
    }

    /// All of a name's addresses, or none of them.
    fn addresses(&self, name: &str, found: &[SocketAddr]) -> Result<(), Forbidden> {
        let name = without_dot(name);
        let is_proxy = self.proxy.as_deref() == Some(name);
        let allowed = |found: &SocketAddr| is_proxy || self.address(found.ip(), name);
        if found.iter().all(allowed) { Ok(()) } else { Err(Forbidden) }
    }
}

/// `localhost` or a loopback address, by its text.
fn is_this_host(host: &Host<&str>) -> bool {
    match host {
        Host::Domain(name) => without_dot(name) == "localhost",
        Host::Ipv4(ip) => ip.is_loopback(),
        Host::Ipv6(ip) => ip.is_loopback(),
    }
}

/// A fully qualified name is the same name.
fn without_dot(name: &str) -> &str {
    name.strip_suffix('.').unwrap_or(name)
}

/// A name has an address that the rules forbid.
#[derive(Debug, thiserror::Error)]
#[error("a forbidden address")]
pub(super) struct Forbidden;

/// A name has no address, or the DNS does not answer.
#[derive(Debug, thiserror::Error)]
#[error("no address")]
pub(super) struct NoAddress;

type Found = Pin<Box<dyn Future<Output = io::Result<Vec<SocketAddr>>> + Send>>;

/// Finds a name's addresses.
pub(super) type Lookup = Arc<dyn Fn(String) -> Found + Send + Sync>;

/// As the host does it: `/etc/hosts` and the DNS.
pub(super) fn host_lookup() -> Lookup {
    // Port 0 stands for the URL's own.
    Arc::new(|name| Box::pin(async move { Ok(tokio::net::lookup_host((name, 0)).await?.collect()) }))
}

/// Resolves names for the client. It is not asked for literal addresses; [`Rules::url`] saw those.
pub(super) struct Resolver {
    pub(super) rules: Arc<Rules>,
    pub(super) lookup: Lookup,
}

impl Resolve for Resolver {
    fn resolve(&self, name: Name) -> Resolving {
        let (rules, found) = (self.rules.clone(), (self.lookup)(name.as_str().to_owned()));
        Box::pin(async move {
            let found = found.await.map_err(|_| NoAddress)?;
            if found.is_empty() {
                return Err(NoAddress.into());
            }
            rules.addresses(name.as_str(), &found)?;
            Ok(Box::new(found.into_iter()) as Addrs)
        })
    }
}

#[cfg(test)]
mod tests;
