// SPDX-License-Identifier: GPL-2.0
/* One-line wrappers of what Rust cannot call: inline functions, macros, unexported functions.  No logic. */

#define CREATE_TRACE_POINTS
#define CREATE_RUST_TRACE_POINTS
#include "helpers.h"

#define KSM_RS_BIND(name) \
	DEFINE_STATIC_CALL_NULL(ksm_rs_call_##name, name); \
	void ksm_rs_bind_##name(unsigned long address) \
	{ \
		static_call_update(ksm_rs_call_##name, (typeof(&name))address); \
	}
#define KSM_RS_DEFINE(ret, name, params, args) \
	KSM_RS_BIND(name) \
	ret ksm_rs_##name params { return static_call(ksm_rs_call_##name) args; }
#define KSM_RS_DEFINE_VOID(name, params, args) \
	KSM_RS_BIND(name) \
	void ksm_rs_##name params { static_call(ksm_rs_call_##name) args; }

KSM_RS_UNEXPORTED(KSM_RS_DEFINE, KSM_RS_DEFINE_VOID)

struct folio *ksm_rs_page_folio(struct page *page)
{
	return page_folio(page);
}

struct page *ksm_rs_folio_page(struct folio *folio)
{
	return folio_page(folio, 0);
}

void ksm_rs_folio_get(struct folio *folio)
{
	folio_get(folio);
}

bool ksm_rs_folio_try_get(struct folio *folio)
{
	return folio_try_get(folio);
}

void ksm_rs_folio_put(struct folio *folio)
{
	folio_put(folio);
}

bool ksm_rs_folio_trylock(struct folio *folio)
{
	return folio_trylock(folio);
}

void ksm_rs_folio_lock(struct folio *folio)
{
	folio_lock(folio);
}

void ksm_rs_folio_unlock(struct folio *folio)
{
	folio_unlock(folio);
}

bool ksm_rs_folio_test_large(struct folio *folio)
{
	return folio_test_large(folio);
}

bool ksm_rs_folio_test_anon(struct folio *folio)
{
	return folio_test_anon(folio);
}

bool ksm_rs_folio_test_ksm(struct folio *folio)
{
	return folio_test_ksm(folio);
}

bool ksm_rs_folio_test_swapcache(struct folio *folio)
{
	return folio_test_swapcache(folio);
}

bool ksm_rs_folio_test_dirty(struct folio *folio)
{
	return folio_test_dirty(folio);
}

void ksm_rs_folio_mark_dirty(struct folio *folio)
{
	folio_mark_dirty(folio);
}

void ksm_rs_folio_mark_accessed(struct folio *folio)
{
	folio_mark_accessed(folio);
}

bool ksm_rs_folio_is_zone_device(struct folio *folio)
{
	return folio_is_zone_device(folio);
}

bool ksm_rs_folio_mapped(struct folio *folio)
{
	return folio_mapped(folio);
}

int ksm_rs_folio_mapcount(struct folio *folio)
{
	return folio_mapcount(folio);
}

int ksm_rs_folio_ref_count(struct folio *folio)
{
	return folio_ref_count(folio);
}

unsigned long ksm_rs_page_to_pfn(struct page *page)
{
	return page_to_pfn(page);
}

struct folio *ksm_rs_pfn_folio(unsigned long pfn)
{
	return pfn_folio(pfn);
}

int ksm_rs_pfn_to_nid(unsigned long pfn)
{
	return pfn_to_nid(pfn);
}

void *ksm_rs_folio_mapping(struct folio *folio)
{
	return READ_ONCE(folio->mapping);
}

void ksm_rs_folio_set_mapping(struct folio *folio, void *mapping)
{
	WRITE_ONCE(folio->mapping, mapping);
}

bool ksm_rs_page_anon_exclusive(struct page *page)
{
	return PageAnonExclusive(page);
}

bool ksm_rs_page_hwpoison(struct page *page)
{
	return PageHWPoison(page);
}

int ksm_rs_folio_try_share_anon_rmap_pte(struct folio *folio, struct page *page)
{
	return folio_try_share_anon_rmap_pte(folio, page);
}

int ksm_rs_split_huge_page(struct page *page)
{
#ifdef CONFIG_TRANSPARENT_HUGEPAGE
	return ksm_rs___split_huge_page_to_list_to_order(page, NULL, 0);
#else
	return -EBUSY;
#endif
}

struct folio *ksm_rs_vma_alloc_folio(struct vm_area_struct *vma, unsigned long addr, gfp_t more)
{
	return vma_alloc_folio(GFP_HIGHUSER_MOVABLE | more, 0, vma, addr);
}

int ksm_rs_mem_cgroup_charge(struct folio *folio, struct mm_struct *mm, gfp_t more)
{
#ifdef CONFIG_MEMCG
	return mem_cgroup_disabled() ? 0 : ksm_rs___mem_cgroup_charge(folio, mm, GFP_KERNEL | more);
#else
	return 0;
#endif
}

int ksm_rs_copy_mc_user_highpage(struct page *to, struct page *from, unsigned long addr, struct vm_area_struct *vma)
{
	return copy_mc_user_highpage(to, from, addr, vma);
}

void ksm_rs_folio_mark_uptodate(struct folio *folio)
{
	__folio_mark_uptodate(folio);
}

void ksm_rs_count_ksm_copy(void)
{
	count_vm_event(COW_KSM);
}

bool ksm_rs_vma_mergeable(struct vm_area_struct *vma)
{
	return (vma->vm_flags & VM_MERGEABLE) && vma->anon_vma;
}

unsigned long ksm_rs_linear_page_index(struct vm_area_struct *vma, unsigned long addr)
{
	return linear_anon_page_index(vma, addr);
}

unsigned long ksm_rs_mm_anon_pages(struct mm_struct *mm)
{
	return get_mm_counter_sum(mm, MM_ANONPAGES);
}

void ksm_rs_vma_iter_init(struct vma_iterator *vmas, struct mm_struct *mm, unsigned long address)
{
	vma_iter_init(vmas, mm, address);
}

struct vm_area_struct *ksm_rs_vma_next(struct vma_iterator *vmas)
{
	return vma_next(vmas);
}

bool ksm_rs_mm_mergeable(struct mm_struct *mm)
{
	return mm_flags_test(MMF_VM_MERGEABLE, mm);
}

bool ksm_rs_mm_tlb_flush_pending(struct mm_struct *mm)
{
	return mm_tlb_flush_pending(mm);
}

bool ksm_rs_mmap_lock_contended(struct mm_struct *mm)
{
	return mmap_lock_is_contended(mm);
}

void ksm_rs_flush_cache_page(struct vm_area_struct *vma, unsigned long addr, unsigned long pfn)
{
	flush_cache_page(vma, addr, pfn);
}

void ksm_rs_get_anon_vma(struct anon_vma *anon_vma)
{
	atomic_inc(&anon_vma->refcount);
}

void ksm_rs_put_anon_vma(struct anon_vma *anon_vma)
{
	if (atomic_dec_and_test(&anon_vma->refcount))
		ksm_rs___put_anon_vma(anon_vma);
}

void ksm_rs_notifier_range_start(struct mmu_notifier_range *range, struct mm_struct *mm, unsigned long start)
{
#ifdef CONFIG_MMU_NOTIFIER
	mmu_notifier_range_init(range, MMU_NOTIFY_CLEAR, MMU_NOTIFIER_RANGE_BLOCKABLE, mm, start, start + PAGE_SIZE);
	if (mm_has_notifiers(mm))
		ksm_rs___mmu_notifier_invalidate_range_start(range);
#endif
}

void ksm_rs_notifier_range_end(struct mmu_notifier_range *range)
{
#ifdef CONFIG_MMU_NOTIFIER
	if (mm_has_notifiers(range->mm))
		ksm_rs___mmu_notifier_invalidate_range_end(range);
#endif
}

pmd_t ksm_rs_pmdp_get_lockless(pmd_t *pmdp)
{
	return pmdp_get_lockless(pmdp);
}

bool ksm_rs_pmd_present(pmd_t pmd)
{
	return pmd_present(pmd);
}

bool ksm_rs_pmd_leaf(pmd_t pmd)
{
	return pmd_leaf(pmd);
}

spinlock_t *ksm_rs_pmd_lock(struct mm_struct *mm, pmd_t *pmdp)
{
	return pmd_lock(mm, pmdp);
}

void ksm_rs_spin_unlock(spinlock_t *lock)
{
	spin_unlock(lock);
}

bool ksm_rs_spin_is_contended(spinlock_t *lock)
{
	return spin_is_contended(lock);
}

struct page *ksm_rs_pmd_page(struct vm_area_struct *vma, unsigned long addr, pmd_t pmd)
{
#ifdef CONFIG_TRANSPARENT_HUGEPAGE
	return ksm_rs_vm_normal_page_pmd(vma, addr, pmd);
#else
	return NULL;
#endif
}

pte_t ksm_rs_ptep_get(pte_t *ptep)
{
	return ptep_get(ptep);
}

bool ksm_rs_pte_none(pte_t pte)
{
	return pte_none(pte);
}

bool ksm_rs_pte_present(pte_t pte)
{
	return pte_present(pte);
}

bool ksm_rs_pte_write(pte_t pte)
{
	return pte_write(pte);
}

bool ksm_rs_pte_dirty(pte_t pte)
{
	return pte_dirty(pte);
}

bool ksm_rs_pte_is_ksm_zero(pte_t pte)
{
	return pte_present(pte) && is_ksm_zero_pte(pte);
}

pte_t ksm_rs_pte_mkclean_wrprotect(pte_t pte)
{
	return pte_wrprotect(pte_mkclean(pte));
}

pte_t ksm_rs_mk_pte(struct page *page, struct vm_area_struct *vma)
{
	return mk_pte(page, vma->vm_page_prot);
}

bool ksm_rs_pte_protnone(pte_t pte)
{
	return pte_protnone(pte);
}

bool ksm_rs_pte_uffd(pte_t pte)
{
	return pte_uffd(pte);
}

pte_t ksm_rs_pte_mkuffd(pte_t pte)
{
	return pte_mkuffd(pte);
}

bool ksm_rs_pte_soft_dirty(pte_t pte)
{
	return pte_soft_dirty(pte);
}

pte_t ksm_rs_pte_mksoft_dirty(pte_t pte)
{
	return pte_mksoft_dirty(pte);
}

pte_t ksm_rs_pte_mkprotnone(pte_t pte)
{
	return pte_modify(pte, PAGE_NONE);
}

unsigned long ksm_rs_zero_pfn(void)
{
	return page_to_pfn(ZERO_PAGE(0));
}

pte_t ksm_rs_mk_ksm_zero_pte(struct vm_area_struct *vma, unsigned long addr)
{
	return pte_mkdirty(pte_mkspecial(pfn_pte(page_to_pfn(ZERO_PAGE(addr)), vma->vm_page_prot)));
}

/* dec_mm_counter() has a tracepoint in it that is not exported. */
void ksm_rs_count_zero_page(struct mm_struct *mm, atomic_long_t *all)
{
	atomic_long_inc(all); atomic_long_inc(&mm->ksm_zero_pages); percpu_counter_dec(&mm->rss_stat[MM_ANONPAGES]);
}

void ksm_rs_uncount_zero_page(struct mm_struct *mm, atomic_long_t *all)
{
	atomic_long_dec(all); atomic_long_dec(&mm->ksm_zero_pages); percpu_counter_inc(&mm->rss_stat[MM_ANONPAGES]);
}

void ksm_rs_adjust_zero_pages(struct mm_struct *mm, atomic_long_t *all, long difference)
{
	atomic_long_add(difference, all); atomic_long_add(difference, &mm->ksm_zero_pages);
}

long ksm_rs_mm_zero_pages(struct mm_struct *mm)
{
	return mm_ksm_zero_pages(mm);
}

long ksm_rs_atomic_long_read(const atomic_long_t *value)
{
	return atomic_long_read(value);
}

void ksm_rs_set_pte_at(struct mm_struct *mm, unsigned long addr, pte_t *ptep, pte_t pte)
{
	set_pte_at(mm, addr, ptep, pte);
}

void ksm_rs_pte_unmap_unlock(pte_t *ptep, spinlock_t *ptl)
{
	pte_unmap_unlock(ptep, ptl);
}

struct folio *ksm_rs_pte_migration_folio(pte_t pte)
{
	const softleaf_t leaf = softleaf_from_pte(pte);

	return softleaf_is_migration(leaf) ? softleaf_to_folio(leaf) : NULL;
}

void ksm_rs_await_migration(struct mm_struct *mm, pmd_t *pmd, unsigned long addr)
{
#ifdef CONFIG_MIGRATION
	ksm_rs_migration_entry_wait(mm, pmd, addr);
#endif
}

struct task_struct *ksm_rs_next_task(struct task_struct *task)
{
	return next_task(task);
}

struct task_struct *ksm_rs_next_thread(struct task_struct *task)
{
	return __next_thread(task);
}

struct mm_struct *ksm_rs_task_user_mm(struct task_struct *task)
{
	return (task->flags & PF_KTHREAD) ? NULL : READ_ONCE(task->mm);
}

void ksm_rs_task_lock(struct task_struct *task)
{
	task_lock(task);
}

void ksm_rs_task_unlock(struct task_struct *task)
{
	task_unlock(task);
}

struct task_struct *ksm_rs_mm_owner(struct mm_struct *mm)
{
#ifdef CONFIG_MEMCG
	return rcu_dereference(mm->owner);
#else
	return NULL;
#endif
}

bool ksm_rs_task_is_new(struct task_struct *task)
{
	return READ_ONCE(task->__state) == TASK_NEW;
}

u64 ksm_rs_task_memcg_id(struct task_struct *task)
{
#ifdef CONFIG_MEMCG
	return mem_cgroup_id(mem_cgroup_from_task(task));
#else
	return 0;
#endif
}

bool ksm_rs_memcg_disabled(void)
{
	return mem_cgroup_disabled();
}

bool ksm_rs_task_is_dumpable(struct task_struct *task)
{
	return READ_ONCE(rcu_dereference(task->exec_state)->dumpable) == TASK_DUMPABLE_OWNER;
}

void ksm_rs_smp_rmb(void)
{
	smp_rmb();
}

const struct cred *ksm_rs_task_cred(struct task_struct *task)
{
	return __task_cred(task);
}

struct task_struct *ksm_rs_kthread_run(int (*thread)(void *data), void *data, int number)
{
	return kthread_run(thread, data, number ? "ksmd_rs/%d" : "ksmd_rs", number);
}

void ksm_rs_set_user_nice(long nice)
{
	set_user_nice(current, nice);
}

unsigned long long ksm_rs_cpu_time(void)
{
	return ksm_rs_task_sched_runtime(current);
}

bool ksm_rs_freezing(void)
{
	return freezing(current);
}

bool ksm_rs_fatal_signal_pending(void)
{
	return fatal_signal_pending(current);
}

void ksm_rs_cond_resched(void)
{
	cond_resched();
}

void ksm_rs_init_waitqueue(struct wait_queue_head *queue)
{
	init_waitqueue_head(queue);
}

void ksm_rs_wake_up(struct wait_queue_head *queue)
{
	wake_up_interruptible(queue);
}

long ksm_rs_wait_freezable(struct wait_queue_head *queue, const int *flag, long timeout)
{
	return wait_event_freezable_timeout(*queue, READ_ONCE(*flag) || kthread_should_stop(), timeout);
}

void ksm_rs_set_oom_origin(bool on)
{
	current->signal->oom_flag_origin = on;
}

void ksm_rs_tracepoint_synchronize(void)
{
	tracepoint_synchronize_unregister();
}

int ksm_rs_register_memory_notifier(struct notifier_block *block)
{
	return register_memory_notifier(block);
}

void ksm_rs_unregister_memory_notifier(struct notifier_block *block)
{
	unregister_memory_notifier(block);
}
