//! kill -9 at random: of the service, of machines' processes and of clients. Each ends as documented, and takes nothing else with it.

#![allow(clippy::tests_outside_test_module)]

mod common;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use common::service::Service;
use common::{assert_code, local_kvm, stderr, vmprobe};
use rustix::process::{Signal, kill_process, test_kill_process};

/// Machines at the same time.
const MACHINES: [&str; 3] = ["a", "b", "c"];

const PATIENCE: Duration = Duration::from_secs(60);

/// A service whose machines all run, each with a client that reads its events.
struct World {
    service: Option<Service>,
    clients: BTreeMap<&'static str, Child>,
    /// Hits that were seen of each machine's first probe.
    hits: BTreeMap<&'static str, u64>,
}

impl World {
    fn new() -> Self {
        let mut world =
            Self { service: Some(Service::start()), clients: BTreeMap::new(), hits: BTreeMap::new() };
        for name in MACHINES {
            world.create(name);
        }
        world
    }

    fn service(&self) -> &Service {
        self.service.as_ref().expect("it is away only while it is restarted")
    }

    fn create(&mut self, name: &'static str) {
        let service = self.service();
        service.json(&["vm", "create", "ticker", "--name", name, "--memory", "64M", "--cpus", "1"]);
        service.json(&["probe", "add", name, "tick"]);
        service.json(&["vm", "start", name]);
        self.hits.insert(name, 0);
        self.watch(name);
    }

    fn watch(&mut self, name: &'static str) {
        let mut client = vmprobe(&["events", name])
            .env("VMPROBE_SOCKET", self.service().socket())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("vmprobe starts");
        // Before it has an event it may not have found the service yet.
        let mut events = BufReader::new(client.stdout.take().expect("piped"));
        events.read_line(&mut String::new()).expect("it is read");
        std::thread::spawn(move || std::io::copy(&mut events, &mut std::io::sink()));
        self.clients.insert(name, client);
    }

    /// The machine goes on to be hit, and none of its hits is lost from its account.
    fn assert_is_hit(&mut self, name: &'static str) {
        let before = self.hits[name];
        let until = Instant::now() + PATIENCE;
        let now = loop {
            let probe = self.service().json(&["probe", "ls", name]).remove(0);
            let count = |name: &str| probe[name].as_u64().unwrap_or_default();
            // One vCPU may be in the middle of a hit.
            let under_way = count("hits") - (count("delivered") + count("filtered") + count("lost"));
            assert!(under_way <= 1, "{probe}");
            if count("hits") > before {
                break count("hits");
            }
            assert!(Instant::now() < until, "{name} is not hit any more: {probe}");
        };
        self.hits.insert(name, now);
    }

    fn kill_client(&mut self, name: &'static str) {
        let mut client = self.clients.remove(name).expect("each has one");
        client.kill().expect("it runs");
        client.wait().expect("it ends");
        self.watch(name);
    }

    /// What becomes of a machine whose process was killed, and of its client.
    fn kill_machine(&mut self, name: &'static str) {
        kill_process(self.service().worker(name), Signal::KILL).expect("it runs");
        let client = self.clients.remove(name).expect("each has one");
        let ended = client.wait_with_output().expect("it ends");
        assert_code(&ended, 2);
        assert!(stderr(&ended).contains(&format!("vmprobe vm rm {name}")), "{}", stderr(&ended));
        let machine = self.service().json(&["vm", "show", name]).remove(0);
        assert_eq!(machine["state"], "failed", "{machine}");
        self.service().json(&["vm", "rm", name]);
        self.create(name);
    }

    fn kill_service(&mut self) {
        let service = self.service.take().expect("it runs");
        self.service = Some(service.kill_and_restart());
        for name in MACHINES {
            let client = self.clients.remove(name).expect("each has one");
            let ended = client.wait_with_output().expect("it ends");
            assert_code(&ended, 3);
            assert!(stderr(&ended).contains("The service is gone"), "{}", stderr(&ended));
            self.watch(name);
        }
    }

    /// Ends in order, and leaves nothing behind.
    fn end(mut self) {
        let service = self.service.take().expect("it runs");
        let workers = MACHINES.map(|name| service.worker(name));
        let (code, dir) = service.terminate();
        assert_eq!(code, Some(0));
        for (name, client) in std::mem::take(&mut self.clients) {
            let ended = client.wait_with_output().expect("it ends");
            assert!(ended.status.success(), "{name}: {}", stderr(&ended));
        }
        // Those that an earlier service had started end a moment later.
        let until = Instant::now() + PATIENCE;
        while workers.iter().any(|worker| test_kill_process(*worker).is_ok()) {
            assert!(Instant::now() < until, "a machine's process goes on");
            std::thread::sleep(Duration::from_millis(5));
        }
        let left: Vec<_> = std::fs::read_dir(dir.path().join("socket.d")).expect("there").collect();
        assert!(left.is_empty() && !dir.path().join("socket").exists(), "{left:?}");
    }
}

fn kill_at_random(kills: u32) {
    if !local_kvm() {
        return;
    }
    let seed = std::env::var("VMPROBE_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| fastrand::u64(..));
    println!("VMPROBE_SEED={seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let mut world = World::new();
    let mut killed = [0; 3];
    for _ in 0..kills {
        std::thread::sleep(Duration::from_millis(random.u64(..50)));
        let name = MACHINES[random.usize(..MACHINES.len())];
        let what = random.usize(..3);
        killed[what] += 1;
        match what {
            0 => world.kill_client(name),
            1 => world.kill_machine(name),
            _ => world.kill_service(),
        }
        for name in MACHINES {
            world.assert_is_hit(name);
        }
    }
    let [clients, machines, services] = killed;
    println!("killed {clients} clients, {machines} machines and {services} services");
    world.end();
}

#[test]
fn fifteen_random_kills_end_as_documented() {
    kill_at_random(15);
}

#[test]
#[ignore = "takes minutes; make campaign runs it"]
fn two_hundred_random_kills_end_as_documented() {
    kill_at_random(200);
}
