//! `merge_scope`: pages are merged within a trust domain only.

use std::collections::BTreeMap;
use std::collections::BTreeSet;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use fastrand::Rng;
use ksm_e2e::Child;
use ksm_e2e::Content;
use ksm_e2e::Ksm;
use ksm_e2e::Passes;
use ksm_e2e::Region;
use ksm_e2e::ksm::Counters;
use ksm_e2e::memory::PAGE;
use ksm_e2e::memory::Pattern;
use ksm_e2e::memory::Timing;
use ksm_e2e::procfs;
use ksm_e2e::procfs::Pfn;
use ksm_e2e::swap::Group;
use ksm_e2e::swap::Swap;
use ksm_e2e::world::Contents;
use ksm_e2e::world::Rules;
use ksm_e2e::world::Shape;
use nix::errno::Errno;

use crate::stock_results::live;
use crate::userfault::Guarded;

ksm_e2e::tests![
    the_file_shows_a_choice_and_takes_a_name,
    it_cannot_change_while_pages_are_shared,
    pages_merge_within_a_domain_and_not_beyond,
    a_process_that_becomes_another_user_leaves_its_pages,
    a_process_that_moves_to_another_cgroup_leaves_its_pages,
    a_process_with_rights_of_two_users_keeps_to_itself,
    a_process_with_secrets_from_its_user_keeps_to_itself,
    pages_that_may_not_be_read_leave_too,
    a_page_that_waits_for_its_like_may_change_its_domain,
    a_child_parts_from_its_parents_merged_pages,
    pages_of_a_fork_are_not_merged_for_a_relative,
    pages_come_back_from_swap_in_another_domain,
    the_zero_page_is_everybodys,
    domains_change_while_all_is_scanned,
    memory_made_at_random_merges_within_processes_by_the_rules,
    a_write_tells_of_another_users_pages_unless_users_are_apart,
];

const SCOPES: [&str; 4] = ["global", "cgroup", "user", "process"];
const CONTENT: Content = Content::Distinct(1);
const PAGES: usize = 16;

/// Two users that nobody is.
const ANN: u32 = 51_001;
const BOB: u32 = 51_002;

fn choose(ksm: &Ksm, scope: &str) -> Result<()> {
    ksm.write_text("merge_scope", scope)?;
    let shown: Vec<String> = SCOPES
        .iter()
        .map(|name| match *name == scope {
            true => format!("[{name}]"),
            false => (*name).to_owned(),
        })
        .collect();
    let (shown, seen) = (shown.join(" ") + "\n", ksm.text("merge_scope")?);
    ensure!(seen == shown, "merge_scope shows {seen:?} after {scope}");
    Ok(())
}

/// A process of a user, in a group if one is given.
fn person(user: u32, group: Option<&Group>) -> Result<Child> {
    let mut child = Child::spawn()?;
    if let Some(group) = group {
        group.add(&child)?;
    }
    child.set_users(user, user, user)?;
    Ok(child)
}

fn the_file_shows_a_choice_and_takes_a_name(ksm: &Ksm) -> Result<()> {
    ensure!(
        ksm.text("merge_scope")? == "[global] cgroup user process\n",
        "the default is {:?}",
        ksm.text("merge_scope")?
    );
    for scope in ["process", "user", "user", "cgroup", "global", "process"] {
        choose(ksm, scope)?;
    }
    for text in [
        "",
        "\n",
        "0",
        "1",
        "users",
        "use",
        "User",
        " user",
        "user ",
        "[user]",
        "user cgroup",
    ] {
        let result = ksm.write_bytes("merge_scope", text.as_bytes());
        ensure!(
            result == Err(Errno::EINVAL) || (text.is_empty() && result == Ok(0)),
            "{text:?} was answered by {result:?}"
        );
        let seen = ksm.text("merge_scope")?;
        ensure!(
            seen == "global cgroup user [process]\n",
            "{text:?} has changed it to {seen:?}"
        );
    }
    choose(ksm, "global")
}

fn it_cannot_change_while_pages_are_shared(ksm: &Ksm) -> Result<()> {
    let mut child = Child::spawn()?;
    let here = child.map_mergeable(PAGES, CONTENT)?;
    let there = child.map_mergeable(PAGES, CONTENT)?;
    for old in SCOPES {
        choose(ksm, old)?;
        ksm.merge_until(Counters::merged(16, 16))?;
        for run in [0, 1] {
            ksm.write("run", run)?;
            for new in SCOPES.into_iter().filter(|new| *new != old) {
                let result = ksm.write_bytes("merge_scope", new.as_bytes());
                ensure!(
                    result == Err(Errno::EBUSY),
                    "from {old} to {new} with pages shared: {result:?}"
                );
            }
            // What is no change is no problem, and nonsense is nonsense.
            choose(ksm, old)?;
            let result = ksm.write_bytes("merge_scope", b"none");
            ensure!(
                result == Err(Errno::EINVAL),
                "setting it to none: {result:?}"
            );
        }
        ksm.stop()?;
        ksm.expect(Counters::merged(16, 16))?;
        ksm.unmerge()?;
    }
    child.verify(here, CONTENT)?;
    child.verify(there, CONTENT)
}

/// Somebody with memory that others have too.
struct Member {
    child: Child,
    user: usize,
    group: usize,
    /// What everybody has.
    same: Region,
    /// What it has twice, and nobody else has.
    twice: [Region; 2],
    own: Content,
}

fn pages_merge_within_a_domain_and_not_beyond(ksm: &Ksm) -> Result<()> {
    let groups = [Group::new()?, Group::new()?];
    let mut members = Vec::new();
    for number in 0..8 {
        let (user, group) = (number / 2 % 2, number / 4);
        let mut child = person([ANN, BOB][user], Some(&groups[group]))?;
        let own = Content::Distinct(10_000 * (number as u64 + 1));
        members.push(Member {
            user,
            group,
            same: child.map_mergeable(256, CONTENT)?,
            twice: [child.map_mergeable(64, own)?, child.map_mergeable(64, own)?],
            own,
            child,
        });
    }
    eprintln!(
        "\n  8 processes of 2 users in 2 cgroups, 256 pages that all have, 64 that each has twice:"
    );
    // What members of a domain have in common.
    type Of = fn(usize, &Member) -> usize;
    let scopes: [(&str, Of); 4] = [
        ("global", |_, _| 0),
        ("cgroup", |_, member| member.group),
        ("user", |_, member| member.user),
        ("process", |number, _| number),
    ];
    for (scope, of) in scopes {
        choose(ksm, scope)?;
        let domain_of = |(number, member): (usize, &Member)| of(number, member);
        let domains: BTreeSet<usize> = members.iter().enumerate().map(domain_of).collect();
        let (domains, alone) = match scope {
            // Nobody has a like.
            "process" => (0, 8 * 256),
            _ => (domains.len() as u64, 0),
        };
        let common = match domains {
            0 => 0,
            domains => (8 - domains) * 256,
        };
        let wanted = Counters::merged(domains * 256 + 8 * 64, common + 8 * 64).and_unshared(alone);
        ksm.merge_until(wanted)?;
        // However long it is tried.
        ksm.scan_passes(3)?;
        ksm.expect(wanted)?;
        for file in ["stable_node_chains", "stable_node_dups"] {
            ensure!(ksm.read(file)? == 0, "{scope}: there are {file}");
        }
        // Who has which page, for every page that all have.
        for index in 0..256 {
            let mut owners: BTreeMap<Pfn, BTreeSet<usize>> = BTreeMap::new();
            for (number, member) in members.iter().enumerate() {
                let page = member.child.pfns(member.same.part(index, 1))?[0];
                owners
                    .entry(page)
                    .or_default()
                    .insert(domain_of((number, member)));
            }
            let wanted = if domains == 0 { 8 } else { domains as usize };
            ensure!(
                owners.len() == wanted && owners.values().all(|domains| domains.len() == 1),
                "{scope}: page {index} is shared as {owners:?}"
            );
        }
        for member in &mut members {
            let [one, other] = member.twice;
            ensure!(
                member.child.pfns(one)? == member.child.pfns(other)?,
                "{scope}: equal pages of one process were not merged"
            );
            member.child.verify(member.same, CONTENT)?;
            member.child.verify(one, member.own)?;
            member.child.verify(other, member.own)?;
        }
        eprintln!(
            "  {scope:8} {:5} pages saved, {:8} bytes of profit",
            wanted.sharing,
            ksm.read_signed("general_profit")?
        );
        ksm.unmerge()?;
    }
    Ok(())
}

/// Two processes that share pages, of which one goes over to another domain, where a third one is.
fn one_goes_over(
    ksm: &Ksm,
    [mut stays, mut goes, mut waits]: [Child; 3],
    go: impl FnOnce(&mut Child) -> Result<()>,
) -> Result<()> {
    let mut passes = Passes::of(ksm)?;
    let here = stays.map_mergeable(PAGES, CONTENT)?;
    let there = goes.map_mergeable(PAGES, CONTENT)?;
    // Which nobody else has yet.
    let theirs = waits.map_mergeable(PAGES, Content::Distinct(500))?;
    passes.make(4)?;
    ksm.expect(Counters::merged(16, 16).and_unshared(16))?;
    let pages = stays.pfns(here)?;
    ensure!(goes.pfns(there)? == pages, "equal pages were not merged");
    go(&mut goes)?;
    passes.pass()?;
    ensure!(
        goes.ksm_pages(there)? == 0 && stays.pfns(here)? == pages,
        "a pass has left pages merged over the border"
    );
    ensure!(
        procfs::ksm_merging_pages(goes.pid())? == 0,
        "the pages are counted still"
    );
    goes.verify(there, CONTENT)?;
    passes.make(3)?;
    ksm.expect(Counters::merged(16, 0).and_unshared(32))?;
    // It finds its like where it is now.
    waits.fill(theirs, CONTENT)?;
    passes.make(4)?;
    ksm.expect(Counters::merged(32, 16))?;
    ensure!(
        goes.pfns(there)? == waits.pfns(theirs)? && stays.pfns(here)? == pages,
        "pages were merged with those of the old domain"
    );
    stays.verify(here, CONTENT)?;
    goes.verify(there, CONTENT)?;
    waits.verify(theirs, CONTENT)
}

fn a_process_that_becomes_another_user_leaves_its_pages(ksm: &Ksm) -> Result<()> {
    choose(ksm, "user")?;
    // One that may become another user is of none but root.
    let people = [Child::spawn()?, Child::spawn()?, person(BOB, None)?];
    one_goes_over(ksm, people, |child| child.set_users(BOB, BOB, BOB))
}

fn a_process_that_moves_to_another_cgroup_leaves_its_pages(ksm: &Ksm) -> Result<()> {
    choose(ksm, "cgroup")?;
    let (from, to) = (Group::new()?, Group::new()?);
    // Users do not matter here.
    let people = [
        person(ANN, Some(&from))?,
        person(BOB, Some(&from))?,
        person(ANN, Some(&to))?,
    ];
    one_goes_over(ksm, people, |child| to.add(child))
}

fn a_process_with_rights_of_two_users_keeps_to_itself(ksm: &Ksm) -> Result<()> {
    choose(ksm, "user")?;
    let mut strangers = Vec::new();
    for ids in [
        [ANN, BOB, BOB],
        [BOB, ANN, BOB],
        [BOB, BOB, ANN],
        [BOB, BOB, ANN],
        [BOB, BOB, BOB],
        [ANN, ANN, ANN],
    ] {
        let mut child = Child::spawn()?;
        child.set_users(ids[0], ids[1], ids[2])?;
        let here = child.map_mergeable(PAGES, CONTENT)?;
        let there = child.map_mergeable(PAGES, CONTENT)?;
        strangers.push((child, here, there));
    }
    let wanted = Counters::merged(6 * 16, 6 * 16);
    ksm.merge_until(wanted)?;
    ksm.scan_passes(3)?;
    ksm.expect(wanted)?;
    let mut seen = BTreeSet::new();
    for (child, here, there) in &mut strangers {
        let pages = child.pfns(*here)?;
        ensure!(
            child.pfns(*there)? == pages,
            "its own pages were not merged"
        );
        seen.extend(pages);
        child.verify(*here, CONTENT)?;
    }
    ensure!(
        seen.len() == 6 * PAGES,
        "processes of different rights share pages"
    );
    Ok(())
}

fn a_process_with_secrets_from_its_user_keeps_to_itself(ksm: &Ksm) -> Result<()> {
    choose(ksm, "user")?;
    let (mut one, mut other) = (person(ANN, None)?, person(ANN, None)?);
    let mut secretive = person(ANN, None)?;
    secretive.prctl(libc::PR_SET_DUMPABLE, 0)?;
    let here = one.map_mergeable(PAGES, CONTENT)?;
    let there = other.map_mergeable(PAGES, CONTENT)?;
    let secret = secretive.map_mergeable(PAGES, CONTENT)?;
    let pages = PAGES as u64;
    ksm.merge_until(Counters::merged(pages, pages).and_unshared(pages))?;
    ksm.scan_passes(3)?;
    ksm.expect(Counters::merged(pages, pages).and_unshared(pages))?;
    ensure!(
        secretive.ksm_pages(secret)? == 0,
        "pages were merged that their user may not read"
    );
    secretive.prctl(libc::PR_SET_DUMPABLE, 1)?;
    ksm.merge_until(Counters::merged(pages, 2 * pages))?;
    // What it keeps from its user from now on leaves those of everybody else.
    one.prctl(libc::PR_SET_DUMPABLE, 0)?;
    ksm.merge_until(Counters::merged(pages, pages).and_unshared(pages))?;
    ensure!(
        one.ksm_pages(here)? == 0,
        "a process shares pages that its user may not read"
    );
    one.verify(here, CONTENT)?;
    other.verify(there, CONTENT)?;
    secretive.verify(secret, CONTENT)
}

/// Userfaultfd waits for the next access to merged pages of this process, which leaves the domain: the pages leave with it,
/// which is no access of its own.
fn pages_that_may_not_be_read_leave_too(ksm: &Ksm) -> Result<()> {
    choose(ksm, "user")?;
    let Some(guarded) = Guarded::merge(ksm)? else {
        return Ok(());
    };
    nix::sys::prctl::set_dumpable(false)?;
    let pages = guarded.region.pages as u64;
    ksm.merge_until(Counters::merged(pages, 0).and_unshared(pages))?;
    nix::sys::prctl::set_dumpable(true)?;
    guarded.expect_private()
}

fn a_page_that_waits_for_its_like_may_change_its_domain(ksm: &Ksm) -> Result<()> {
    choose(ksm, "cgroup")?;
    let (here, there) = (Group::new()?, Group::new()?);
    let mut turns = Passes::of(ksm)?;
    let mut people = Vec::new();
    for _ in 0..2 {
        let mut child = person(ANN, Some(&here))?;
        let region = child.map_mergeable(PAGES, CONTENT)?;
        people.push((child, region));
    }
    // One process at a turn.
    ksm.write("pages_to_scan", PAGES as u64)?;
    turns.turn()?;
    let known = |child: &Child| procfs::ksm_stat(child.pid(), "ksm_rmap_items");
    let counts = [known(&people[0].0)?, known(&people[1].0)?];
    let first = (counts.iter().position(|count| *count == PAGES as u64))
        .filter(|_| counts.contains(&0))
        .with_context(|| format!("a turn has seen {counts:?} pages of the two"))?;
    while ksm.read("pages_unshared")? != PAGES as u64 {
        turns.turn()?;
    }
    // The pages of the first one wait for those of the second one, which are the next.
    there.add(&people[first].0)?;
    let scanned = ksm.read("pages_scanned")?;
    while ksm.read("pages_scanned")? < scanned + 6 * PAGES as u64 {
        turns.turn()?;
        let seen = ksm.counters()?;
        ensure!(
            seen.shared == 0 && seen.sharing == 0,
            "pages of another cgroup were merged: {seen}"
        );
    }
    ksm.expect(Counters::merged(0, 0).and_unshared(32))?;
    // Back home they are merged.
    here.add(&people[first].0)?;
    ksm.write("pages_to_scan", 100_000)?;
    turns.make(4)?;
    ksm.expect(Counters::merged(16, 16))?;
    for (child, region) in &mut people {
        child.verify(*region, CONTENT)?;
    }
    Ok(())
}

fn a_child_parts_from_its_parents_merged_pages(ksm: &Ksm) -> Result<()> {
    for scope in ["process", "user"] {
        choose(ksm, scope)?;
        let mut passes = Passes::of(ksm)?;
        let mut parent = Child::spawn()?;
        let here = parent.map_mergeable(PAGES, CONTENT)?;
        let there = parent.map_mergeable(PAGES, CONTENT)?;
        passes.make(4)?;
        ksm.expect(Counters::merged(16, 16))?;
        let pages = parent.pfns(here)?;
        let mut child = parent.fork()?;
        if scope == "user" {
            // Not before it is another user's.
            passes.pass()?;
            ksm.expect(Counters::merged(16, 48))?;
            child.set_users(ANN, ANN, ANN)?;
        }
        ensure!(
            child.pfns(here)? == pages,
            "the child does not map the merged pages"
        );
        passes.pass()?;
        let left: BTreeSet<Pfn> = child.pfns(here)?.into_iter().collect();
        ensure!(
            pages.iter().all(|page| !left.contains(page)),
            "{scope}: a pass has left the child merged with its parent"
        );
        child.verify(here, CONTENT)?;
        child.verify(there, CONTENT)?;
        passes.make(4)?;
        // Each has its own.
        ksm.expect(Counters::merged(32, 32))?;
        ensure!(
            child.pfns(here)? == child.pfns(there)? && child.ksm_pages(here)? == PAGES,
            "{scope}: the child's own equal pages were not merged"
        );
        ensure!(
            parent.pfns(here)? == pages && parent.pfns(there)? == pages,
            "{scope}: the parent has lost its pages"
        );
        for (process, region) in [(&mut parent, here), (&mut child, there)] {
            process.verify(region, CONTENT)?;
        }
        ksm.unmerge()?;
        child.verify(here, CONTENT)?;
        parent.verify(there, CONTENT)?;
    }
    Ok(())
}

fn pages_of_a_fork_are_not_merged_for_a_relative(ksm: &Ksm) -> Result<()> {
    choose(ksm, "user")?;
    let mut turns = Passes::of(ksm)?;
    // The one whose page becomes the KSM page is the one that is scanned last, so both have a child.
    let mut families = Vec::new();
    for _ in 0..2 {
        let mut parent = Child::spawn()?;
        let region = parent.map_mergeable(PAGES, CONTENT)?;
        let mut child = parent.fork()?;
        child.set_users(BOB, BOB, BOB)?;
        let pages = child.pfns(region)?;
        ensure!(parent.pfns(region)? == pages, "fork has copied pages");
        families.push((parent, child, region, pages));
    }
    // The children, being of one user, would merge with each other: one of them must not.
    let strange = Content::Distinct(700);
    let (_, other, region, pages) = &mut families[1];
    other.advise(*region, libc::MADV_UNMERGEABLE)?;
    ensure!(
        other.pfns(*region)? == *pages,
        "a child's pages have changed"
    );
    // One process at a turn.
    ksm.write("pages_to_scan", PAGES as u64)?;
    let wanted = Counters::merged(16, 16).and_unshared(16);
    let mut count = 0;
    while ksm.counters()? != wanted {
        turns.turn()?;
        for (_, child, region, pages) in &families {
            ensure!(
                child.ksm_pages(*region)? == 0 && child.pfns(*region)? == *pages,
                "a child's pages were merged with those of another user"
            );
        }
        count += 1;
        ensure!(count < 60, "nothing is merged: {}", ksm.counters()?);
    }
    for (parent, child, region, _) in &mut families {
        ensure!(
            parent.ksm_pages(*region)? == PAGES,
            "parents were not merged"
        );
        parent.verify(*region, CONTENT)?;
        child.verify(*region, CONTENT)?;
        child.fill(*region, strange)?;
        parent.verify(*region, CONTENT)?;
        child.verify(*region, strange)?;
    }
    Ok(())
}

fn pages_come_back_from_swap_in_another_domain(ksm: &Ksm) -> Result<()> {
    choose(ksm, "user")?;
    let swap = Swap::on(4096)?;
    let group = Group::new()?;
    let mut stays = Child::spawn()?;
    let mut goes = Child::spawn()?;
    for child in [&stays, &goes] {
        group.add(child)?;
    }
    let here = stays.map_mergeable(PAGES, CONTENT)?;
    let there = goes.map_mergeable(PAGES, CONTENT)?;
    ksm.merge_until(Counters::merged(16, 16))?;
    group.swap_out(&[(&stays, here), (&goes, there)])?;
    goes.set_users(ANN, ANN, ANN)?;
    stays.verify(here, CONTENT)?;
    goes.verify(there, CONTENT)?;
    ksm.scan_passes(4)?;
    let pages: BTreeSet<Pfn> = stays.pfns(here)?.into_iter().collect();
    ensure!(
        goes.pfns(there)?.iter().all(|page| !pages.contains(page)),
        "pages are shared over the border"
    );
    stays.verify(here, CONTENT)?;
    goes.verify(there, CONTENT)?;
    swap.off()
}

fn the_zero_page_is_everybodys(ksm: &Ksm) -> Result<()> {
    ksm.write("use_zero_pages", 1)?;
    choose(ksm, "process")?;
    let mut people = Vec::new();
    for user in [ANN, BOB] {
        let mut child = person(user, None)?;
        let region = child.map_mergeable(PAGES, Content::Zero)?;
        people.push((child, region));
    }
    let zero_pages = ksm.read("ksm_zero_pages")?;
    ksm.scan_passes(3)?;
    ksm.expect(Counters::merged(0, 0))?;
    ensure!(
        ksm.read("ksm_zero_pages")? == zero_pages + 2 * PAGES as u64,
        "empty pages were not replaced"
    );
    for (child, region) in &mut people {
        for pfn in child.pfns(*region)? {
            ensure!(pfn.flags()?.zero_page(), "{pfn:?} is not the zero page");
        }
        child.verify(*region, Content::Zero)?;
    }
    // Without it an empty page is a page like others.
    ksm.unmerge()?;
    ksm.write("use_zero_pages", 0)?;
    for (child, region) in &mut people {
        child.fill(*region, Content::Zero)?;
    }
    ksm.merge_until(Counters::merged(2, 30))?;
    choose_anew(ksm, "user")?;
    ksm.merge_until(Counters::merged(2, 30))?;
    choose_anew(ksm, "global")?;
    ksm.merge_until(Counters::merged(1, 31))
}

fn choose_anew(ksm: &Ksm, scope: &str) -> Result<()> {
    ksm.unmerge()?;
    choose(ksm, scope)
}

fn domains_change_while_all_is_scanned(ksm: &Ksm) -> Result<()> {
    choose(ksm, "cgroup")?;
    let groups = [Group::new()?, Group::new()?, Group::new()?];
    let mut random = Rng::with_seed(1);
    let mut people = Vec::new();
    for _ in 0..6 {
        let mut child = person(ANN, Some(&groups[0]))?;
        let region = child.map_mergeable(100, CONTENT)?;
        people.push((child, region));
    }
    ksm.write("scan_threads", 3)?;
    ksm.scan_at_full_speed()?;
    ksm.start()?;
    let mut late = Vec::new();
    for round in 0..150 {
        let (child, region) = &mut people[random.usize(..6)];
        random.choice(&groups).context("a group")?.add(child)?;
        match round % 5 {
            0 => child.verify(*region, CONTENT)?,
            1 => {
                let first = random.usize(..90);
                let part = region.part(first, 10);
                child.fill(part, Content::Same(9))?;
                child.verify(part, Content::Same(9))?;
                child.fill(part, CONTENT.from_page(first))?;
            }
            2 => child.fill(*region, CONTENT)?,
            3 => late.push((child.fork()?, *region)),
            _ => drop(late.pop()),
        }
    }
    drop(late);
    // Two of them in each.
    for (number, (child, region)) in people.iter_mut().enumerate() {
        child.fill(*region, CONTENT)?;
        groups[number / 2].add(child)?;
    }
    ksm.scan_until(Counters::merged(300, 300))?;
    let mut pages = BTreeSet::new();
    for pair in people.chunks_mut(2) {
        let mine = pair[0].0.pfns(pair[0].1)?;
        ensure!(
            pair[1].0.pfns(pair[1].1)? == mine,
            "a pair does not share its pages"
        );
        pages.extend(mine);
        for (child, region) in pair {
            child.verify(*region, CONTENT)?;
        }
    }
    ensure!(pages.len() == 300, "pages are shared over the border");
    Ok(())
}

fn memory_made_at_random_merges_within_processes_by_the_rules(ksm: &Ksm) -> Result<()> {
    let shape = Shape {
        processes: 3,
        areas: 2,
        pages: 48,
        contents: Contents::Everything,
        volatile: false,
        bound: false,
        unadvised: true,
        forks: 2,
    };
    for seed in ksm_e2e::seeds(&[1, 2, 3])? {
        let mut random = Rng::with_seed(seed);
        let rules = Rules {
            use_zero_pages: random.bool(),
            by_process: true,
            ..Rules::default()
        };
        live(ksm, &mut random, shape, rules, true).with_context(|| format!("with seed {seed}"))?;
    }
    Ok(())
}

/// How many pages a spy asks about.
const SECRETS: usize = 200;

/// How many pages teach it what to expect.
const LESSONS: usize = 64;

/// What a spy finds out.
struct Findings {
    /// Share of its answers that are right, by the clock and by the number of page faults.
    by_clock: f64,
    by_faults: f64,
    /// Medians of what the writes took: to the pages that the victim has, to those that it has not.
    nanos: [u64; 2],
}

fn median(mut values: Vec<u64>) -> u64 {
    values.sort_unstable();
    values[values.len() / 2]
}

/// A spy has pages of which a victim, another user, has every second one, chosen at random, and writes to them.
fn spy(ksm: &Ksm, scope: &str, random: &mut Rng) -> Result<Findings> {
    choose_anew(ksm, scope)?;
    let (mut spy, mut victim) = (person(ANN, None)?, person(BOB, None)?);
    // What it has twice is merged for certain, what nobody else can have for certain not.
    let lesson = Content::Distinct(10_000);
    let twice = spy.map_mergeable(LESSONS, lesson)?;
    spy.map_mergeable(LESSONS, lesson)?;
    let unique = spy.map_mergeable(LESSONS, Content::Distinct(20_000))?;
    let guesses = spy.map_mergeable(SECRETS, CONTENT)?;

    let mut held: Vec<bool> = (0..SECRETS).map(|index| index % 2 == 0).collect();
    random.shuffle(&mut held);
    let secrets = victim.map_mergeable(SECRETS, Content::Distinct(30_000))?;
    let paint: Vec<(usize, Pattern)> = (0..SECRETS)
        .filter(|&index| held[index])
        .map(|index| (secrets.page(index), Pattern::Seed(1 + index as u64)))
        .collect();
    victim.paint(&paint)?;

    let (lessons, half, all) = (LESSONS as u64, SECRETS as u64 / 2, SECRETS as u64);
    let wanted = match scope {
        "global" => {
            Counters::merged(lessons + half, lessons + half).and_unshared(lessons + 2 * half)
        }
        _ => Counters::merged(lessons, lessons).and_unshared(lessons + 2 * all),
    };
    ksm.merge_until(wanted)?;

    // All in a random order, so that nothing but the page makes the difference. The first ones are for practice.
    let mut pages: Vec<usize> = Vec::new();
    for region in [twice, unique, guesses] {
        pages.extend(region.addresses());
    }
    random.shuffle(&mut pages);
    let practice = spy.map(ksm_e2e::memory::Mapping::pages(32))?;
    spy.fill(practice, Content::Same(4))?;
    let all: Vec<usize> = practice.addresses().chain(pages).collect();
    let timings: BTreeMap<usize, Timing> =
        all.iter().copied().zip(spy.time_writes(&all)?).collect();
    spy.verify(guesses, CONTENT)?;

    let of = |region: Region| -> Vec<u64> {
        (region.addresses())
            .map(|page| timings[&page].nanos)
            .collect()
    };
    let (slow, fast) = (median(of(twice)), median(of(unique)));
    ensure!(
        slow > fast,
        "a write to a merged page takes {slow} ns, to another {fast} ns"
    );
    let threshold = fast.midpoint(slow);
    let share = |right: &dyn Fn(usize) -> bool| {
        (0..SECRETS).filter(|&index| right(index)).count() as f64 / SECRETS as f64
    };
    let timing = |index: usize| timings[&(guesses.addr + index * PAGE)];
    let nanos = [true, false].map(|wanted| {
        let nanos = (0..SECRETS).filter(|&index| held[index] == wanted);
        median(nanos.map(|index| timing(index).nanos).collect())
    });
    Ok(Findings {
        by_clock: share(&|index| (timing(index).nanos > threshold) == held[index]),
        by_faults: share(&|index| (timing(index).faults > 0) == held[index]),
        nanos,
    })
}

fn a_write_tells_of_another_users_pages_unless_users_are_apart(ksm: &Ksm) -> Result<()> {
    let mut random = Rng::with_seed(7);
    eprintln!("\n  {SECRETS} pages of one user, every second one of which another user has too:");
    for scope in ["global", "user", "process", "global"] {
        let Findings {
            by_clock,
            by_faults,
            nanos: [held, others],
        } = spy(ksm, scope, &mut random)?;
        eprintln!(
            "  {scope:8} a write takes {held:6} ns where the other has it, {others:6} ns elsewhere; \
             told apart: {:5.1} % by the clock, {:5.1} % by page faults",
            100.0 * by_clock,
            100.0 * by_faults
        );
        if scope == "global" {
            ensure!(
                by_clock >= 0.9 && by_faults >= 0.99,
                "the channel that is to be closed is not there: {by_clock} and {by_faults} are told"
            );
        } else {
            // Half of the pages is what a guess gets right.
            ensure!(
                (0.4..=0.6).contains(&by_clock) && (0.49..=0.51).contains(&by_faults),
                "{scope}: {by_clock} are told by the clock, {by_faults} by page faults"
            );
        }
    }
    Ok(())
}
