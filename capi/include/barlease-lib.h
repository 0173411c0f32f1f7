/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * The library barlease for C: leases of BAR ranges that can be taken back.
 *
 * An owner opens a device, exports leases and revokes them. A holder receives a
 * lease, maps it, and reads and writes through the mapping.
 *
 * Errors. A function that returns int returns 0 (or what it says) when it
 * worked, and a negative errno otherwise; barlease_last_error() has the text:
 * operation, object, cause and remedy. Of every function:
 *
 *   -EFAULT      a pointer that must not be NULL is NULL
 *   -EINVAL      an argument that cannot be right, a flag that does not exist
 *   -EREMOTEIO   the lease is inaccessible, for now or for good
 *   -ESTALE      the lease is dead: revoked, or its owner closed the device
 *   -EXDEV       the lease is of another device, or of an earlier open of it
 *   -EMEDIUMTYPE the descriptor is not a lease made by the barlease module
 *   -EOPNOTSUPP  driver, kernel, device or platform cannot do it
 *   -EACCES, -EPERM  no permission; -EROFS a write to what is read-only
 *   -EBUSY       somebody else uses it
 *   -EPROTO      a peer or the kernel sent what is not understood
 *   any other    as the kernel answered
 *
 * Outputs are written when a function succeeds, and left alone otherwise.
 *
 * Handles. A handle is made by one function and freed by another; NULL may be
 * freed, a handle may not be freed twice. They are independent: a mapping stays
 * when its lease is closed, a lease when the device handle is (though it is
 * dead when the device is). Any threads may use a handle at the same time; none
 * may while it is freed. A process that forks uses handles of before in one of
 * the two processes only, but for leases and mappings.
 *
 * Signals. A guarded mapping, and a scratch one, install a handler of SIGBUS. A
 * thread that accesses one of them must not block SIGBUS, and a handler that is
 * installed later must pass on what is not its own. The shared library cannot
 * be unloaded by dlclose().
 */
#ifndef BARLEASE_LIB_H
#define BARLEASE_LIB_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* A device that this process has open. */
struct barlease_device;
/* A lease: a dma-buf of BAR ranges. */
struct barlease_lease;
/* A mapping of a lease. */
struct barlease_mapping;

/* A range of a BAR, in bytes, aligned to pages. */
struct barlease_range {
	uint64_t offset;
	uint64_t length;
};

/* States of a lease. */
#define BARLEASE_LEASE_OK 0 /* accessible */
#define BARLEASE_LEASE_REVOKED 1 /* inaccessible while a reason holds */
#define BARLEASE_LEASE_DEAD 2 /* inaccessible for ever */

/* Memory types of mappings. */
#define BARLEASE_UNCACHED 0 /* each access by itself, in order: the default */
#define BARLEASE_WRITE_COMBINING 1 /* stores are gathered and may be reordered */

/* The answer of barlease_status(). Grows at its end only. */
struct barlease_status {
	uint32_t state; /* BARLEASE_LEASE_... */
	uint32_t reasons; /* bits, BARLEASE_REASON_... of barlease.h */
	uint32_t memory_type; /* of mmaps from now on */
	uint32_t bar;
	uint64_t size; /* bytes: the sum of the ranges */
	uint32_t ranges;
	uint32_t attachments; /* importers attached */
};

/* A lease, as barlease_list() shows it. Grows at its end only. */
struct barlease_record {
	uint64_t id;
	uint64_t size; /* bytes: the sum of the ranges */
	uint32_t bar;
	uint32_t ranges;
	uint32_t state; /* BARLEASE_LEASE_... */
	uint32_t reasons; /* bits, BARLEASE_REASON_... of barlease.h */
	uint32_t memory_type; /* of mmaps from now on */
	uint32_t flags; /* BARLEASE_RECORD_... */
	uint32_t attachments; /* importers attached */
	uint32_t dma_mappings; /* mappings that importers have */
	uint32_t mappings; /* mappings in processes */
	uint32_t wc_mappings; /* those of them that are write-combining */
	char name[32]; /* ends with NUL; empty when it could not be read */
};

#define BARLEASE_RECORD_INTERNAL 1 /* no lease: mappings of the BAR itself */
#define BARLEASE_RECORD_DRAINING 2 /* dead, and an importer is to let go of it */
#define BARLEASE_RECORD_WRITABLE 4 /* can be mapped for writing */

/*
 * barlease_last_error - the text of the calling thread's last error
 *
 * Returns a text, empty before the first error, that is valid until the thread's
 * next call of this library that fails. Never NULL.
 */
const char *barlease_last_error(void);

/*
 * barlease_last_done - how many bytes of a block the calling thread's last call that
 * failed had copied: of barlease_read_block() and barlease_write_block() with
 * -EREMOTEIO. 0 of every other error.
 */
size_t barlease_last_done(void);

/* ---- Owners: devices -------------------------------------------------------------------- */

/*
 * barlease_device_open - open the function at address `bdf` ("0000:01:00.0")
 *
 * -EINVAL: no address; -ENODEV: no such function; -ENXIO: not bound to a vfio
 * driver; -EPERM: its IOMMU group has devices that are bound to others; -EACCES;
 * -EBUSY: open already; -EOPNOTSUPP: in no IOMMU group.
 */
int barlease_device_open(const char *bdf, struct barlease_device **device);

/*
 * barlease_device_adopt - use the VFIO device that descriptor `fd` is of
 *
 * Works on a duplicate: `fd` stays the caller's, and the device is open until
 * both are closed. `bdf` may be NULL with Linux 6.17 and later; it is for
 * messages, and nothing checks it. The device must be in an IOMMU domain already,
 * as a VMM has it.
 *
 * -EBADF: no descriptor; -ENOTTY, -EOPNOTSUPP: not of a device of VFIO's, or
 * `bdf` is needed; -EINVAL: `bdf` is no address; -EMFILE.
 */
int barlease_device_adopt(int fd, const char *bdf, struct barlease_device **device);

/*
 * barlease_device_fd - the descriptor of a device, which stays the handle's
 *
 * -EFAULT: NULL.
 */
int barlease_device_fd(const struct barlease_device *device);

/*
 * barlease_device_close - free a device handle; leases of the device are dead
 * when every descriptor and mapping of the device is gone. No errors.
 */
void barlease_device_close(struct barlease_device *device);

/* ---- Owners: leases --------------------------------------------------------------------- */

#define BARLEASE_EXPORT_READ_ONLY 1 /* can be mapped for reading only */

/*
 * barlease_export - lease ranges of BAR `bar` (0 to 5): their concatenation
 *
 * `count` 0 (`ranges` may be NULL then): all of the BAR but the pages of an
 * MSI-X table.
 *
 * -EINVAL: a range that is empty, not page aligned or past the end; -E2BIG: more
 * than 65,536; -ENODEV: not a BAR of at least a page; -EPERM: the MSI-X table,
 * and the IOMMU does not isolate interrupts; -EOVERFLOW; -EMFILE; -EOPNOTSUPP.
 */
int barlease_export(const struct barlease_device *device, uint32_t bar,
		    const struct barlease_range *ranges, size_t count, uint32_t flags,
		    struct barlease_lease **lease);

/*
 * barlease_revoke - revoke a lease, at once and for good
 *
 * When it returns 0, no process and no importer reaches the ranges through the
 * lease. Waits for importers without a time-out. The ranges can be leased again
 * at once.
 *
 * -ESTALE: revoked before; -EXDEV; -EMEDIUMTYPE; -EOPNOTSUPP.
 */
int barlease_revoke(const struct barlease_device *device, const struct barlease_lease *lease);

#define BARLEASE_REVOKE_DO_NOT_WAIT 1 /* tell importers, and do not wait for them */

/*
 * barlease_revoke_id - revoke the lease of this id
 *
 * With BARLEASE_REVOKE_DO_NOT_WAIT: -EINPROGRESS when it is revoked, and an
 * importer still has access; BARLEASE_RECORD_DRAINING ends when it has none, and
 * the eventfd is signalled then.
 *
 * -ENOENT: no such lease of this open of the device; -ESTALE: revoked before;
 * -EINVAL: not a lease but mappings of a BAR; -EOPNOTSUPP.
 */
int barlease_revoke_id(const struct barlease_device *device, uint64_t id, uint32_t flags);

/*
 * barlease_list - call `each` with every lease of this open of the device, by id
 *
 * Leases that come or go meanwhile may be missing; each other one is there once.
 * The record is valid during the call only. A value of `each` that is not 0 ends
 * the list, and is returned. `each` must return: no longjmp, no exception.
 *
 * -EOPNOTSUPP: not the driver of Barlease, or an older one; -EPROTO.
 */
int barlease_list(const struct barlease_device *device,
		  int (*each)(const struct barlease_record *record, void *context),
		  void *context);

/*
 * barlease_events - a new eventfd that is signalled on changes
 *
 * Whenever a lease changes its state, has drained or disappears, and when the
 * memory of the device goes off or on. It says only that barlease_list() or
 * barlease_status() is worth asking. It takes the place of the one before, does
 * not block, and is closed on exec. Returns the descriptor, which the caller
 * closes.
 *
 * -EOPNOTSUPP; -EMFILE; -ENFILE; -ENOMEM.
 */
int barlease_events(const struct barlease_device *device);

/*
 * barlease_status - state of a lease
 *
 * `size` is sizeof(*status): of a smaller structure the rest is left out, of a
 * larger one it is zeroed.
 *
 * -EXDEV; -EMEDIUMTYPE; -EOPNOTSUPP.
 */
int barlease_status(const struct barlease_device *device, const struct barlease_lease *lease,
		    struct barlease_status *status, size_t size);

/*
 * barlease_set_memory_type - the memory type that later mmaps of a lease get
 *
 * -EOPNOTSUPP: write-combining would not be real here; -ESTALE; -EXDEV;
 * -EMEDIUMTYPE; -EINVAL: no such type.
 */
int barlease_set_memory_type(const struct barlease_device *device,
			     const struct barlease_lease *lease, uint32_t memory_type);

/*
 * barlease_set_steering_tags - the TPH steering tags of peer-to-peer writes to a lease
 *
 * `tag` has 8 bits and `extended_tag` 16; they are separate, 0 is a tag of
 * either, and -1 is none. `hint` is the processing hint, 0 to 3. They take the
 * place of the ones before.
 *
 * -EOPNOTSUPP: the device does not complete TPH, or its driver has no tags;
 * -ESTALE; -EXDEV; -EMEDIUMTYPE; -EINVAL: no such tag or hint.
 */
int barlease_set_steering_tags(const struct barlease_device *device,
			       const struct barlease_lease *lease, int tag, int extended_tag,
			       uint32_t hint);

/*
 * barlease_alias_region - a further region of the device that maps BAR `bar`
 * with another memory type; its index goes to `region`
 *
 * The same request gives the same index. Ask for its offset and size with
 * VFIO_DEVICE_GET_REGION_INFO, as for any region, and mmap it there through
 * barlease_device_fd(). It lives until the device is closed.
 *
 * -EOPNOTSUPP: write-combining would not be real here, or the driver has no
 * aliases; -EINVAL: uncached, or the alias of an alias; -ENODEV: no BAR that can
 * be mapped; -ENOSPC.
 */
int barlease_alias_region(const struct barlease_device *device, uint32_t bar, uint32_t memory_type,
			  uint32_t *region);

/* ---- Leases ----------------------------------------------------------------------------- */

/*
 * barlease_lease_adopt - a lease of which this process has the descriptor
 *
 * Works on a duplicate: `fd` stays the caller's. Any file that can be mapped
 * will do, for tests.
 *
 * -EBADF; -EINVAL: the file has no size; -EMFILE.
 */
int barlease_lease_adopt(int fd, struct barlease_lease **lease);

/*
 * barlease_lease_fd - the descriptor of a lease, which stays the handle's
 *
 * -EFAULT: NULL.
 */
int barlease_lease_fd(const struct barlease_lease *lease);

/*
 * barlease_lease_id - the id of a lease on this host, until the next boot
 *
 * As kernel errors of fstat().
 */
int barlease_lease_id(const struct barlease_lease *lease, uint64_t *id);

/* barlease_lease_size - bytes of a lease; 0 of NULL. */
uint64_t barlease_lease_size(const struct barlease_lease *lease);

/*
 * barlease_lease_is_writable - 1: can be mapped for writing, 0: cannot
 *
 * -EFAULT: NULL.
 */
int barlease_lease_is_writable(const struct barlease_lease *lease);

/*
 * barlease_lease_set_name - name a lease, for /proc/PID/maps and lists
 *
 * -EINVAL: more than 31 bytes, or not UTF-8; -ENOTTY: not a dma-buf.
 */
int barlease_lease_set_name(const struct barlease_lease *lease, const char *name);

/*
 * barlease_lease_send - send a lease to the peer of a unix stream socket
 *
 * `timeout_ms` -1: waits for as long as it takes. After an error the connection
 * is of no more use.
 *
 * -ETIMEDOUT; -EPIPE and others as from sendmsg(): SIGPIPE is not raised.
 */
int barlease_lease_send(const struct barlease_lease *lease, int socket, int timeout_ms);

#define BARLEASE_RECEIVE_ANY_FILE 1 /* not only dma-bufs, for tests */

/*
 * barlease_lease_receive - receive a lease from the peer of a unix stream socket
 *
 * As barlease_lease_send(). Nothing behind the lease is read.
 *
 * -EPROTO: the peer sent anything else, or ended the connection; -ETIMEDOUT.
 */
int barlease_lease_receive(int socket, uint32_t flags, int timeout_ms,
			   struct barlease_lease **lease);

/* barlease_lease_close - free a lease handle; mappings stay. No errors. */
void barlease_lease_close(struct barlease_lease *lease);

/* ---- Holders: mappings ------------------------------------------------------------------ */

#define BARLEASE_MAP_GUARDED 1 /* a lost access is -EREMOTEIO, and not SIGBUS */
#define BARLEASE_MAP_READ_ONLY 2
#define BARLEASE_MAP_SCRATCH 4 /* for code that has its address: barlease_section() */

/*
 * barlease_map - map `length` bytes of a lease from `offset` on, or all with 0, 0
 *
 * Offset and length are multiples of the page size; `length` 0 is the rest.
 *
 * An access to a guarded mapping whose lease is revoked is -EREMOTEIO, and works
 * again when the lease is accessible again. An access to a plain one raises
 * SIGBUS.
 *
 * -ESTALE: the lease is dead; -EOPNOTSUPP: its exporter cannot be mapped, or the
 * guard does not exist on this CPU (x86-64 and aarch64 have it); -EINVAL: the
 * range; -EACCES; -EBUSY: too many SIGBUS handlers over the guard's; -ENOMEM.
 */
int barlease_map(const struct barlease_lease *lease, uint64_t offset, uint64_t length,
		 uint32_t flags, struct barlease_mapping **mapping);

/* barlease_mapping_length - bytes of a mapping; 0 of NULL. */
size_t barlease_mapping_length(const struct barlease_mapping *mapping);

/*
 * barlease_mapping_address - where a mapping begins; NULL of NULL
 *
 * An access through it is never guarded; see barlease_section() for what can be
 * done about that. It is valid until barlease_unmap().
 */
void *barlease_mapping_address(const struct barlease_mapping *mapping);

/*
 * barlease_read8 ... barlease_write64 - one load or store at an offset
 *
 * -ERANGE: past the end; -EINVAL: not aligned to its width; -EROFS: a write to a
 * read-only mapping; -EREMOTEIO: guarded, and the lease is revoked: nothing was
 * written, and no value was read; -EOPNOTSUPP: a scratch mapping.
 */
int barlease_read8(const struct barlease_mapping *mapping, size_t offset, uint8_t *value);
int barlease_read16(const struct barlease_mapping *mapping, size_t offset, uint16_t *value);
int barlease_read32(const struct barlease_mapping *mapping, size_t offset, uint32_t *value);
int barlease_read64(const struct barlease_mapping *mapping, size_t offset, uint64_t *value);
int barlease_write8(const struct barlease_mapping *mapping, size_t offset, uint8_t value);
int barlease_write16(const struct barlease_mapping *mapping, size_t offset, uint16_t value);
int barlease_write32(const struct barlease_mapping *mapping, size_t offset, uint32_t value);
int barlease_write64(const struct barlease_mapping *mapping, size_t offset, uint64_t value);

/*
 * barlease_read_block - copy `length` bytes at `offset` to `target`
 * barlease_write_block - copy `length` bytes from `source` to `offset`
 *
 * With the widest aligned accesses. The memory of the caller must not overlap the
 * mapping, and may be NULL if `length` is 0.
 *
 * -ERANGE, -EROFS: nothing was copied; -EREMOTEIO: guarded, and the lease is
 * revoked: barlease_last_done() bytes were copied; -EOPNOTSUPP: a scratch mapping.
 */
int barlease_read_block(const struct barlease_mapping *mapping, size_t offset, void *target,
			size_t length);
int barlease_write_block(const struct barlease_mapping *mapping, size_t offset,
			 const void *source, size_t length);

/*
 * barlease_section - call `access` with the address of a scratch mapping, and tell
 * whether all its accesses went to the lease
 *
 * For code that must have an address, such as another library. When an access
 * faults since the lease is revoked, memory of zeroes takes the place of the
 * mapping, at the same address, so that `access` comes to its end. Returns what
 * `access` returns. `access` must return: no longjmp, no exception. It must not
 * return a negative number, which would be taken for an error of this function.
 *
 * -EREMOTEIO: the mapping is lost. Values that were read must not be used, and
 * writes may or may not have reached the device. If it was lost before, `access`
 * is not called. -EINVAL: not made with BARLEASE_MAP_SCRATCH.
 */
int barlease_section(const struct barlease_mapping *mapping,
		     int (*access)(void *address, void *context), void *context);

/*
 * barlease_is_lost - 1: a section found the lease revoked, and barlease_recover()
 * has not mapped it again, 0: not
 *
 * -EINVAL: not made with BARLEASE_MAP_SCRATCH.
 */
int barlease_is_lost(const struct barlease_mapping *mapping);

/*
 * barlease_recover - map the lease again, at the same address, after it was lost
 *
 * Does nothing if it is not. 0 says that the lease is mapped; if it is still
 * revoked the next section is lost again. Not for signal handlers.
 *
 * -ESTALE: the lease is dead; -ENOMEM: the address may be lost for good then;
 * -EINVAL: not made with BARLEASE_MAP_SCRATCH.
 */
int barlease_recover(const struct barlease_mapping *mapping);

/* barlease_unmap - unmap, and free the handle. No errors. */
void barlease_unmap(struct barlease_mapping *mapping);

#ifdef __cplusplus
}
#endif

#endif
