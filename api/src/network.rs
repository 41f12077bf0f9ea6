//! The networks of a machine: the option of `vmprobe run`, and passt, which needs no rights.

use std::io;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::str::FromStr;

use vmm::{MacAddress, Network};

use crate::exit::Failure;
use crate::images::chain;

/// What connects a guest with the host's network without rights (Debian's package passt).
const PASST: &str = "passt";

/// The longest packet that passt tells the guest of: the device has no room for longer ones.
const MTU: &str = "1500";

/// The guest's address where it asks for one, and that of its gateway, behind which are the host's own loopback addresses: those of
/// QEMU's user network, which a guest without DHCP can know beforehand.
const ADDRESS: [&str; 6] = ["--address", "10.0.2.15", "--netmask", "24", "--gateway", "10.0.2.2"];

/// A network that `--net` asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkWanted {
    pub kind: NetworkKind,
    /// One of those for local use where it is not said.
    pub mac: Option<MacAddress>,
}

/// Where it leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NetworkKind {
    /// A tap of the host's, by its name.
    Tap(String),
    /// Where this process can connect to, by passt.
    User(Vec<Forward>),
    /// In the emulated machine: the network of this number, which is where that runs.
    Relayed(usize),
}

/// A port of the host's that leads to one of the guest's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forward {
    pub protocol: Protocol,
    pub host: u16,
    pub guest: u16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    Tcp,
    Udp,
}

impl FromStr for Forward {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parse = || {
            let mut parts = text.split(':');
            let protocol = match parts.next()? {
                "tcp" => Protocol::Tcp,
                "udp" => Protocol::Udp,
                _ => return None,
            };
            let mut port = || parts.next()?.parse().ok().filter(|port| *port != 0);
            let forward = Self { protocol, host: port()?, guest: port()? };
            parts.next().is_none().then_some(forward)
        };
        parse().ok_or_else(|| {
            format!("`{text}` is no forward; it looks like tcp:2222:22, the host's port first")
        })
    }
}

impl FromStr for NetworkWanted {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const FORM: &str = "tap=NAME[,mac=MAC], or user[,forward=tcp|udp:HOST:GUEST]...[,mac=MAC]";
        let mut parts = disk::split(text).into_iter();
        let first = parts.next().unwrap_or_default();
        let mut kind = match first.split_once('=') {
            Some(("tap", name)) if !name.is_empty() => NetworkKind::Tap(name.to_owned()),
            Some(("relay", index)) => {
                NetworkKind::Relayed(index.parse().map_err(|_| format!("`{index}` is no number"))?)
            }
            None if first == "user" => NetworkKind::User(Vec::new()),
            _ => return Err(format!("A network begins with what it is: {FORM}")),
        };
        let mut mac = None;
        for part in parts {
            match (part.split_once('='), &mut kind) {
                (Some(("mac", address)), _) => {
                    let address = address.parse::<MacAddress>().map_err(|error| error.to_string())?;
                    if mac.replace(address).is_some() {
                        return Err(format!("`{part}` comes after another address; say it once"));
                    }
                }
                (Some(("forward", forward)), NetworkKind::User(forwards)) => forwards.push(forward.parse()?),
                _ => return Err(format!("`{part}` is nothing that this network has; there are {FORM}")),
            }
        }
        Ok(Self { kind, mac })
    }
}

/// passt while the machine runs. Dropped, it is ended.
#[derive(Debug)]
pub struct Passt(Child);

impl Drop for Passt {
    fn drop(&mut self) {
        // Both fail only if it has ended and been waited for.
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

impl NetworkWanted {
    /// Opens the network. What is returned besides has to live as long as the machine.
    ///
    /// # Errors
    /// It cannot be had, and what to do.
    pub fn open(&self) -> Result<(Network, Option<Passt>), Failure> {
        let mac = self.mac.unwrap_or_else(MacAddress::random);
        let failure = |error: &dyn std::error::Error| Failure::Host(format!("--net: {}", chain(error)));
        match &self.kind {
            NetworkKind::Tap(name) => {
                Network::tap(name, mac).map(|network| (network, None)).map_err(|error| failure(&error))
            }
            NetworkKind::Relayed(index) => nested::init::network_port(*index)
                .and_then(|port| Network::stream("the network's port", port, mac))
                .map(|network| (network, None))
                .map_err(|error| failure(&error)),
            NetworkKind::User(forwards) => {
                let (ours, theirs) = UnixStream::pair().map_err(|error| failure(&error))?;
                let passt = start(forwards, theirs)?;
                let network = Network::stream(PASST, ours, mac).map_err(|error| failure(&error))?;
                Ok((network, Some(passt)))
            }
        }
    }
}

impl NetworkWanted {
    /// The network as a stream of frames, for the emulated machine, which is given [`NetworkWanted::relayed`]. passt has to live as
    /// long as that.
    ///
    /// # Errors
    /// It cannot be had, and what to do.
    pub fn far_end(&self) -> Result<(UnixStream, Passt), Failure> {
        let NetworkKind::User(forwards) = &self.kind else {
            return Err(Failure::Host(
                "No --net tap reaches out of the emulated machine of --accel nested; --net user does"
                    .to_owned(),
            ));
        };
        let (ours, theirs) = UnixStream::pair().map_err(|error| Failure::Host(error.to_string()))?;
        Ok((ours, start(forwards, theirs)?))
    }

    /// The same for the emulated machine, as its number `index`.
    pub fn relayed(&self, index: usize) -> String {
        format!("relay={index},mac={}", self.mac.unwrap_or_else(MacAddress::random))
    }
}

fn start(forwards: &[Forward], stream: UnixStream) -> Result<Passt, Failure> {
    let mut command = Command::new(PASST);
    command.args(arguments(forwards));
    // Its standard input is the connection. What it has to say goes where this process's messages go.
    command.stdin(std::os::fd::OwnedFd::from(stream)).stdout(Stdio::null());
    // A terminal's Ctrl-C is not for it: the guest may still have something to say. It ends when the connection does.
    command.process_group(0);
    let child = command.spawn().map_err(|error| {
        Failure::Host(if error.kind() == io::ErrorKind::NotFound {
            "--net user: there is no passt; install it (Debian: `apt install passt`)".to_owned()
        } else {
            format!("--net user: passt cannot be started: {error}")
        })
    })?;
    Ok(Passt(child))
}

/// The command line of passt (passt(1)).
fn arguments(forwards: &[Forward]) -> Vec<String> {
    let mut arguments: Vec<String> =
        ["--fd", "0", "--foreground", "--quiet", "--mtu", MTU].map(str::to_owned).into();
    arguments.extend(ADDRESS.map(str::to_owned));
    for (option, protocol) in [("--tcp-ports", Protocol::Tcp), ("--udp-ports", Protocol::Udp)] {
        let ports: Vec<String> = forwards
            .iter()
            .filter(|forward| forward.protocol == protocol)
            .map(|forward| format!("{}:{}", forward.host, forward.guest))
            .collect();
        // Only what is asked for.
        arguments.push(option.to_owned());
        arguments.push(if ports.is_empty() { "none".to_owned() } else { ports.join(",") });
    }
    arguments
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_are_described_by_what_they_are() {
        let tap = |mac| NetworkWanted { kind: NetworkKind::Tap("tap0".to_owned()), mac };
        assert_eq!("tap=tap0".parse(), Ok(tap(None)));
        assert_eq!(
            "tap=tap0,mac=52:54:00:01:02:03".parse(),
            Ok(tap(Some(MacAddress([0x52, 0x54, 0, 1, 2, 3]))))
        );
        let forwards = vec![
            Forward { protocol: Protocol::Tcp, host: 2222, guest: 22 },
            Forward { protocol: Protocol::Udp, host: 5300, guest: 53 },
        ];
        let user = NetworkWanted { kind: NetworkKind::User(forwards), mac: None };
        assert_eq!("user,forward=tcp:2222:22,forward=udp:5300:53".parse(), Ok(user));
        for wrong in [
            "",
            "tap",
            "tap=",
            "user=x",
            "bridge=br0",
            "tap=t,forward=tcp:1:2",
            "user,mac=x",
            "tap=t,mac=01:00:00:00:00:00",
            "user,forward=tcp:0:22",
            "user,forward=tcp:22",
            "user,forward=sctp:1:2",
            "user,forward=tcp:1:2:3",
            "user,x",
            "tap=t,mac=52:54:00:01:02:03,mac=52:54:00:01:02:03",
            "user,forward=tcp:65536:1",
        ] {
            assert!(wrong.parse::<NetworkWanted>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_emulated_machine_is_told_the_same_address() {
        let wanted: NetworkWanted = "user,mac=52:54:00:01:02:03".parse().unwrap();
        let inner: NetworkWanted = wanted.relayed(1).parse().unwrap();
        assert_eq!(inner, NetworkWanted { kind: NetworkKind::Relayed(1), ..wanted });
    }

    #[test]
    fn passt_forwards_what_was_asked_for_and_nothing_else() {
        let forwards = ["tcp:2222:22", "tcp:8080:80"].map(|forward| forward.parse().unwrap());
        let arguments = arguments(&forwards).join(" ");
        assert!(arguments.ends_with("--tcp-ports 2222:22,8080:80 --udp-ports none"), "{arguments}");
    }
}
