/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The events below /sys/kernel/tracing/events/ksm_rs: those that stock has under ksm, with the same fields, and two
 * of our own.  trace.rs fires them.  Addresses come as numbers, for Rust to pass without unsafe.  The names differ
 * from stock's, as a BPF program that asks for a raw tracepoint by name is given the core's own first.
 */
#undef TRACE_SYSTEM
#define TRACE_SYSTEM ksm_rs

#if !defined(KSM_RS_EVENTS_H) || defined(TRACE_HEADER_MULTI_READ)
#define KSM_RS_EVENTS_H

#include <linux/tracepoint.h>

/* A pass over all mergeable memory: its number, and how many pages are known. */
DECLARE_EVENT_CLASS(ksm_rs_pass,
	TP_PROTO(int seq, unsigned int rmap_entries),
	TP_ARGS(seq, rmap_entries),
	TP_STRUCT__entry(
		__field(int, seq)
		__field(u32, rmap_entries)
	),
	TP_fast_assign(
		__entry->seq = seq;
		__entry->rmap_entries = rmap_entries;
	),
	TP_printk("seq %d rmap size %u", __entry->seq, __entry->rmap_entries)
);

DEFINE_EVENT(ksm_rs_pass, ksm_rs_start_scan, TP_PROTO(int seq, unsigned int rmap_entries), TP_ARGS(seq, rmap_entries));
DEFINE_EVENT(ksm_rs_pass, ksm_rs_stop_scan, TP_PROTO(int seq, unsigned int rmap_entries), TP_ARGS(seq, rmap_entries));

/* An address space that is scanned from now on, or no more. */
DECLARE_EVENT_CLASS(ksm_rs_mm,
	TP_PROTO(unsigned long mm),
	TP_ARGS(mm),
	TP_STRUCT__entry(
		__field(void *, mm)
	),
	TP_fast_assign(
		__entry->mm = (void *)mm;
	),
	TP_printk("mm %p", __entry->mm)
);

DEFINE_EVENT(ksm_rs_mm, ksm_rs_enter, TP_PROTO(unsigned long mm), TP_ARGS(mm));
DEFINE_EVENT(ksm_rs_mm, ksm_rs_exit, TP_PROTO(unsigned long mm), TP_ARGS(mm));

/* The zero page was to be mapped in the place of an empty page; pfn is the zero page's. */
TRACE_EVENT(ksm_rs_merge_one_page,
	TP_PROTO(unsigned long pfn, unsigned long rmap_item, unsigned long mm, int err),
	TP_ARGS(pfn, rmap_item, mm, err),
	TP_STRUCT__entry(
		__field(unsigned long, pfn)
		__field(void *, rmap_item)
		__field(void *, mm)
		__field(int, err)
	),
	TP_fast_assign(
		__entry->pfn = pfn;
		__entry->rmap_item = (void *)rmap_item;
		__entry->mm = (void *)mm;
		__entry->err = err;
	),
	TP_printk("ksm pfn %lu rmap_item %p mm %p error %d",
		  __entry->pfn, __entry->rmap_item, __entry->mm, __entry->err)
);

/* A page was to become a KSM page (ksm_page is NULL), or one was to be mapped in its place. */
TRACE_EVENT(ksm_rs_merge_with_ksm_page,
	TP_PROTO(unsigned long ksm_page, unsigned long pfn, unsigned long rmap_item, unsigned long mm, int err),
	TP_ARGS(ksm_page, pfn, rmap_item, mm, err),
	TP_STRUCT__entry(
		__field(void *, ksm_page)
		__field(unsigned long, pfn)
		__field(void *, rmap_item)
		__field(void *, mm)
		__field(int, err)
	),
	TP_fast_assign(
		__entry->ksm_page = (void *)ksm_page;
		__entry->pfn = pfn;
		__entry->rmap_item = (void *)rmap_item;
		__entry->mm = (void *)mm;
		__entry->err = err;
	),
	TP_printk("%spfn %lu rmap_item %p mm %p error %d", __entry->ksm_page ? "ksm " : "",
		  __entry->pfn, __entry->rmap_item, __entry->mm, __entry->err)
);

/* A stable node was dropped, as its page is gone or has no mapping left. */
TRACE_EVENT(ksm_rs_remove_ksm_page,
	TP_PROTO(unsigned long pfn),
	TP_ARGS(pfn),
	TP_STRUCT__entry(
		__field(unsigned long, pfn)
	),
	TP_fast_assign(
		__entry->pfn = pfn;
	),
	TP_printk("pfn %lu", __entry->pfn)
);

/* A mapping was taken off its stable node while that was dropped. */
TRACE_EVENT(ksm_rs_remove_rmap_item,
	TP_PROTO(unsigned long pfn, unsigned long rmap_item, unsigned long mm),
	TP_ARGS(pfn, rmap_item, mm),
	TP_STRUCT__entry(
		__field(unsigned long, pfn)
		__field(void *, rmap_item)
		__field(void *, mm)
	),
	TP_fast_assign(
		__entry->pfn = pfn;
		__entry->rmap_item = (void *)rmap_item;
		__entry->mm = (void *)mm;
	),
	TP_printk("pfn %lu rmap_item %p mm %p", __entry->pfn, __entry->rmap_item, __entry->mm)
);

/* What the advisor decided after a pass: seconds that it took, the new pages_to_scan, the CPU's share in percent. */
TRACE_EVENT(ksm_rs_advisor,
	TP_PROTO(s64 scan_time, unsigned long pages_to_scan, unsigned int cpu_percent),
	TP_ARGS(scan_time, pages_to_scan, cpu_percent),
	TP_STRUCT__entry(
		__field(s64, scan_time)
		__field(unsigned long, pages_to_scan)
		__field(unsigned int, cpu_percent)
	),
	TP_fast_assign(
		__entry->scan_time = scan_time;
		__entry->pages_to_scan = pages_to_scan;
		__entry->cpu_percent = cpu_percent;
	),
	TP_printk("ksm scan time %lld pages_to_scan %lu cpu percent %u",
		  __entry->scan_time, __entry->pages_to_scan, __entry->cpu_percent)
);

/* Ours: the pages that one turn of the mmap lock found, from an address on; those that smart scan left out. */
TRACE_EVENT(ksm_rs_batch,
	TP_PROTO(unsigned long mm, unsigned long address, unsigned int pages, unsigned int skipped),
	TP_ARGS(mm, address, pages, skipped),
	TP_STRUCT__entry(
		__field(void *, mm)
		__field(unsigned long, address)
		__field(unsigned int, pages)
		__field(unsigned int, skipped)
	),
	TP_fast_assign(
		__entry->mm = (void *)mm;
		__entry->address = address;
		__entry->pages = pages;
		__entry->skipped = skipped;
	),
	TP_printk("mm %p address 0x%lx pages %u skipped %u",
		  __entry->mm, __entry->address, __entry->pages, __entry->skipped)
);

/* Ours: a search for a page's hash in a forest; the nodes that it passed, and whether there was one of that hash. */
TRACE_EVENT(ksm_rs_lookup,
	TP_PROTO(bool stable, int nid, unsigned int depth, bool found),
	TP_ARGS(stable, nid, depth, found),
	TP_STRUCT__entry(
		__field(bool, stable)
		__field(int, nid)
		__field(unsigned int, depth)
		__field(bool, found)
	),
	TP_fast_assign(
		__entry->stable = stable;
		__entry->nid = nid;
		__entry->depth = depth;
		__entry->found = found;
	),
	TP_printk("%s nid %d depth %u found %d", __entry->stable ? "stable" : "unstable",
		  __entry->nid, __entry->depth, __entry->found)
);

#endif

#undef TRACE_INCLUDE_PATH
#define TRACE_INCLUDE_PATH .
#undef TRACE_INCLUDE_FILE
#define TRACE_INCLUDE_FILE ksm_rs_events
#include <trace/define_trace.h>
