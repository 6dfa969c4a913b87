/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What ksm_rs needs of the kernel that the `kernel` crate's own bindings do not have: a few types, and
 * wrappers (helpers.c) of inline functions, macros and unexported functions.  Kbuild runs bindgen over it.
 */
#ifndef KSM_RS_HELPERS_H
#define KSM_RS_HELPERS_H

#include <linux/mm.h>
#include <linux/cred.h>
#include <linux/freezer.h>
#include <linux/kallsyms.h>
#include <linux/kobject.h>
#include <linux/kprobes.h>
#include <linux/ksm.h>
#include <linux/kthread.h>
#include <linux/swap.h>
#include <linux/leafops.h>
#include <linux/memcontrol.h>
#include <linux/memory.h>
#include <linux/mm_inline.h>
#include <linux/mmu_notifier.h>
#include <linux/oom.h>
#include <linux/pagewalk.h>
#include <linux/rmap.h>
#include <linux/sched/coredump.h>
#include <linux/sched/cputime.h>
#include <linux/sched/exec_state.h>
#include <linux/sched/mm.h>
#include <linux/sched/signal.h>
#include <linux/sched/task.h>
#include <linux/static_call.h>
#include <linux/sysfs.h>
#include <linux/tracepoint.h>
#include <linux/version.h>
#include <linux/wait.h>
#include "ksm_rs_events.h"

/* What older series call by other names, or do without; docs/kernel-series.md says where else they differ. */
#if LINUX_VERSION_CODE < KERNEL_VERSION(7, 3, 0)
#define linear_anon_page_index linear_page_index
#define pte_uffd pte_uffd_wp
#define pte_mkuffd pte_mkuffd_wp
#endif

/* Declared in mm/internal.h and mm/swap.h, which are no part of a kernel's header package. */
pmd_t *mm_find_pmd(struct mm_struct *mm, unsigned long address);
void __put_anon_vma(struct anon_vma *anon_vma);
void folio_add_lru_vma(struct folio *folio, struct vm_area_struct *vma);

/*
 * One line per unexported function that we call: return type, name, parameters, arguments.  Each makes the
 * wrapper ksm_rs_NAME() and ksm_rs_bind_NAME(), which symbols.rs calls once with the address.
 */
#define KSM_RS_UNEXPORTED(CALL, VOID_CALL) \
	CALL(unsigned long, kallsyms_lookup_name, (const char *name), (name)) \
	CALL(int, walk_page_range_vma, \
	     (struct vm_area_struct *vma, unsigned long start, unsigned long end, \
	      const struct mm_walk_ops *ops, void *private), \
	     (vma, start, end, ops, private)) \
	CALL(struct page *, vm_normal_page, \
	     (struct vm_area_struct *vma, unsigned long addr, pte_t pte), (vma, addr, pte)) \
	CALL(pmd_t *, mm_find_pmd, (struct mm_struct *mm, unsigned long address), (mm, address)) \
	CALL(pte_t *, pte_offset_map_lock, \
	     (struct mm_struct *mm, pmd_t *pmd, unsigned long addr, spinlock_t **ptlp), \
	     (mm, pmd, addr, ptlp)) \
	CALL(pte_t, ptep_clear_flush, \
	     (struct vm_area_struct *vma, unsigned long address, pte_t *ptep), (vma, address, ptep)) \
	VOID_CALL(folio_add_anon_rmap_ptes, \
		  (struct folio *folio, struct page *page, int nr_pages, struct vm_area_struct *vma, \
		   unsigned long address, rmap_t flags), \
		  (folio, page, nr_pages, vma, address, flags)) \
	VOID_CALL(folio_add_new_anon_rmap, \
		  (struct folio *folio, struct vm_area_struct *vma, unsigned long address, rmap_t flags), \
		  (folio, vma, address, flags)) \
	VOID_CALL(folio_add_lru_vma, (struct folio *folio, struct vm_area_struct *vma), (folio, vma)) \
	VOID_CALL(folio_remove_rmap_ptes, \
		  (struct folio *folio, struct page *page, int nr_pages, struct vm_area_struct *vma), \
		  (folio, page, nr_pages, vma)) \
	CALL(int, memcmp_pages, (struct page *page1, struct page *page2), (page1, page2)) \
	CALL(bool, folio_free_swap, (struct folio *folio), (folio)) \
	VOID_CALL(__put_anon_vma, (struct anon_vma *anon_vma), (anon_vma)) \
	VOID_CALL(lru_add_drain_all, (void), ()) \
	CALL(unsigned long long, task_sched_runtime, (struct task_struct *task), (task)) \
	KSM_RS_UNEXPORTED_MEMCG(CALL) \
	KSM_RS_UNEXPORTED_MIGRATION(VOID_CALL) \
	KSM_RS_UNEXPORTED_NOTIFIER(CALL, VOID_CALL) \
	KSM_RS_UNEXPORTED_THP(CALL)

#ifdef CONFIG_MEMCG
#define KSM_RS_UNEXPORTED_MEMCG(CALL) \
	CALL(int, __mem_cgroup_charge, \
	     (struct folio *folio, struct mm_struct *mm, gfp_t gfp), (folio, mm, gfp))
#else
#define KSM_RS_UNEXPORTED_MEMCG(CALL)
#endif

#ifdef CONFIG_MIGRATION
#define KSM_RS_UNEXPORTED_MIGRATION(VOID_CALL) \
	VOID_CALL(migration_entry_wait, \
		  (struct mm_struct *mm, pmd_t *pmd, unsigned long address), (mm, pmd, address))
#else
#define KSM_RS_UNEXPORTED_MIGRATION(VOID_CALL)
#endif

#ifdef CONFIG_MMU_NOTIFIER
#define KSM_RS_UNEXPORTED_NOTIFIER(CALL, VOID_CALL) \
	CALL(int, __mmu_notifier_invalidate_range_start, (struct mmu_notifier_range *range), (range)) \
	VOID_CALL(__mmu_notifier_invalidate_range_end, (struct mmu_notifier_range *range), (range))
#else
#define KSM_RS_UNEXPORTED_NOTIFIER(CALL, VOID_CALL)
#endif

#ifdef CONFIG_TRANSPARENT_HUGEPAGE
#define KSM_RS_UNEXPORTED_THP(CALL) \
	CALL(struct page *, vm_normal_page_pmd, \
	     (struct vm_area_struct *vma, unsigned long addr, pmd_t pmd), (vma, addr, pmd)) \
	CALL(int, __split_huge_page_to_list_to_order, \
	     (struct page *page, struct list_head *list, unsigned int new_order), \
	     (page, list, new_order))
#else
#define KSM_RS_UNEXPORTED_THP(CALL)
#endif

#define KSM_RS_DECLARE(ret, name, params, args) \
	ret ksm_rs_##name params; \
	void ksm_rs_bind_##name(unsigned long address);
#define KSM_RS_DECLARE_VOID(name, params, args) KSM_RS_DECLARE(void, name, params, args)
KSM_RS_UNEXPORTED(KSM_RS_DECLARE, KSM_RS_DECLARE_VOID)

/* A macro with sizeof in it, which bindgen does not evaluate. */
enum { KSM_RS_KSYM_SYMBOL_LEN = KSYM_SYMBOL_LEN };

/* Flags that bindgen does not evaluate either. */
enum { KSM_RS_RMAP_EXCLUSIVE = RMAP_EXCLUSIVE };
enum {
	KSM_RS_GFP_ZERO = (unsigned int)__GFP_ZERO,
	KSM_RS_GFP_MODEST = (unsigned int)(__GFP_NORETRY | __GFP_NOWARN),
};

/* Folios and pages. */
struct folio *ksm_rs_page_folio(struct page *page);
struct page *ksm_rs_folio_page(struct folio *folio);
void ksm_rs_folio_get(struct folio *folio);
bool ksm_rs_folio_try_get(struct folio *folio);
void ksm_rs_folio_put(struct folio *folio);
bool ksm_rs_folio_trylock(struct folio *folio);
void ksm_rs_folio_lock(struct folio *folio);
void ksm_rs_folio_unlock(struct folio *folio);
bool ksm_rs_folio_test_large(struct folio *folio);
bool ksm_rs_folio_test_anon(struct folio *folio);
bool ksm_rs_folio_test_ksm(struct folio *folio);
bool ksm_rs_folio_test_swapcache(struct folio *folio);
bool ksm_rs_folio_test_dirty(struct folio *folio);
void ksm_rs_folio_mark_dirty(struct folio *folio);
void ksm_rs_folio_mark_accessed(struct folio *folio);
bool ksm_rs_folio_is_zone_device(struct folio *folio);
bool ksm_rs_folio_mapped(struct folio *folio);
int ksm_rs_folio_mapcount(struct folio *folio);
int ksm_rs_folio_ref_count(struct folio *folio);
unsigned long ksm_rs_page_to_pfn(struct page *page);
struct folio *ksm_rs_pfn_folio(unsigned long pfn);
int ksm_rs_pfn_to_nid(unsigned long pfn);
void *ksm_rs_folio_mapping(struct folio *folio);
void ksm_rs_folio_set_mapping(struct folio *folio, void *mapping);
bool ksm_rs_page_anon_exclusive(struct page *page);
bool ksm_rs_page_hwpoison(struct page *page);
int ksm_rs_folio_try_share_anon_rmap_pte(struct folio *folio, struct page *page);
int ksm_rs_split_huge_page(struct page *page);
struct folio *ksm_rs_vma_alloc_folio(struct vm_area_struct *vma, unsigned long addr, gfp_t more);
int ksm_rs_mem_cgroup_charge(struct folio *folio, struct mm_struct *mm, gfp_t more);
int ksm_rs_copy_mc_user_highpage(struct page *to, struct page *from, unsigned long addr, struct vm_area_struct *vma);
void ksm_rs_folio_mark_uptodate(struct folio *folio);
void ksm_rs_count_ksm_copy(void);

/* VMAs and address spaces. */
bool ksm_rs_vma_mergeable(struct vm_area_struct *vma);
unsigned long ksm_rs_linear_page_index(struct vm_area_struct *vma, unsigned long addr);
bool ksm_rs_mm_mergeable(struct mm_struct *mm);
unsigned long ksm_rs_mm_anon_pages(struct mm_struct *mm);
void ksm_rs_vma_iter_init(struct vma_iterator *vmas, struct mm_struct *mm, unsigned long address);
struct vm_area_struct *ksm_rs_vma_next(struct vma_iterator *vmas);
bool ksm_rs_mm_tlb_flush_pending(struct mm_struct *mm);
bool ksm_rs_mmap_lock_contended(struct mm_struct *mm);
void ksm_rs_flush_cache_page(struct vm_area_struct *vma, unsigned long addr, unsigned long pfn);
void ksm_rs_get_anon_vma(struct anon_vma *anon_vma);
void ksm_rs_put_anon_vma(struct anon_vma *anon_vma);
void ksm_rs_notifier_range_start(struct mmu_notifier_range *range, struct mm_struct *mm, unsigned long start);
void ksm_rs_notifier_range_end(struct mmu_notifier_range *range);

/* Page tables. */
pmd_t ksm_rs_pmdp_get_lockless(pmd_t *pmdp);
bool ksm_rs_pmd_present(pmd_t pmd);
bool ksm_rs_pmd_leaf(pmd_t pmd);
spinlock_t *ksm_rs_pmd_lock(struct mm_struct *mm, pmd_t *pmdp);
void ksm_rs_spin_unlock(spinlock_t *lock);
bool ksm_rs_spin_is_contended(spinlock_t *lock);
struct page *ksm_rs_pmd_page(struct vm_area_struct *vma, unsigned long addr, pmd_t pmd);
pte_t ksm_rs_ptep_get(pte_t *ptep);
bool ksm_rs_pte_none(pte_t pte);
bool ksm_rs_pte_present(pte_t pte);
bool ksm_rs_pte_write(pte_t pte);
bool ksm_rs_pte_dirty(pte_t pte);
bool ksm_rs_pte_is_ksm_zero(pte_t pte);
pte_t ksm_rs_pte_mkclean_wrprotect(pte_t pte);
pte_t ksm_rs_mk_pte(struct page *page, struct vm_area_struct *vma);
bool ksm_rs_pte_protnone(pte_t pte);
bool ksm_rs_pte_uffd(pte_t pte);
pte_t ksm_rs_pte_mkuffd(pte_t pte);
bool ksm_rs_pte_soft_dirty(pte_t pte);
pte_t ksm_rs_pte_mksoft_dirty(pte_t pte);
pte_t ksm_rs_pte_mkprotnone(pte_t pte);
unsigned long ksm_rs_zero_pfn(void);
pte_t ksm_rs_mk_ksm_zero_pte(struct vm_area_struct *vma, unsigned long addr);
void ksm_rs_count_zero_page(struct mm_struct *mm, atomic_long_t *all);
void ksm_rs_uncount_zero_page(struct mm_struct *mm, atomic_long_t *all);
void ksm_rs_adjust_zero_pages(struct mm_struct *mm, atomic_long_t *all, long difference);
long ksm_rs_mm_zero_pages(struct mm_struct *mm);
long ksm_rs_atomic_long_read(const atomic_long_t *value);
void ksm_rs_set_pte_at(struct mm_struct *mm, unsigned long addr, pte_t *ptep, pte_t pte);
void ksm_rs_pte_unmap_unlock(pte_t *ptep, spinlock_t *ptl);
struct folio *ksm_rs_pte_migration_folio(pte_t pte);
void ksm_rs_await_migration(struct mm_struct *mm, pmd_t *pmd, unsigned long addr);

/* Tasks, the thread, waiting. */
struct task_struct *ksm_rs_next_task(struct task_struct *task);
struct task_struct *ksm_rs_next_thread(struct task_struct *task);
struct mm_struct *ksm_rs_task_user_mm(struct task_struct *task);
void ksm_rs_task_lock(struct task_struct *task);
void ksm_rs_task_unlock(struct task_struct *task);
struct task_struct *ksm_rs_mm_owner(struct mm_struct *mm);
bool ksm_rs_task_is_new(struct task_struct *task);
u64 ksm_rs_task_memcg_id(struct task_struct *task);
bool ksm_rs_memcg_disabled(void);
bool ksm_rs_task_is_dumpable(struct task_struct *task);
void ksm_rs_smp_rmb(void);
const struct cred *ksm_rs_task_cred(struct task_struct *task);
struct task_struct *ksm_rs_kthread_run(int (*thread)(void *data), void *data, int number);
void ksm_rs_set_user_nice(long nice);
unsigned long long ksm_rs_cpu_time(void);
bool ksm_rs_freezing(void);
bool ksm_rs_fatal_signal_pending(void);
void ksm_rs_cond_resched(void);
void ksm_rs_init_waitqueue(struct wait_queue_head *queue);
void ksm_rs_wake_up(struct wait_queue_head *queue);
long ksm_rs_wait_freezable(struct wait_queue_head *queue, const int *flag, long timeout);
void ksm_rs_set_oom_origin(bool on);
void ksm_rs_tracepoint_synchronize(void);
int ksm_rs_register_memory_notifier(struct notifier_block *block);
void ksm_rs_unregister_memory_notifier(struct notifier_block *block);

#endif
