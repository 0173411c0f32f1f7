/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * An owner and a holder. The owner leases a page of a BAR to another process and
 * takes it back while that is using it; the holder finds out and lives on.
 *
 *     lease BDF BAR      with a device, bound to barlease-vfio-pci
 *     lease              the holder only, on a file that plays the device
 *     lease keep         the same, and nothing is taken away: for valgrind, under
 *                        which no signal handler can go on behind an access
 */
#define _GNU_SOURCE
#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <barlease-lib.h>

#define PAGE 4096u
#define LONG 60000 /* ms */

static int failed(const char *what)
{
	fprintf(stderr, "%s: %s\n", what, barlease_last_error());
	return 1;
}

/* How a holder loses its lease. */
enum loss { BY_OWNER, BY_TRUNCATION, NEVER };

/* Receives a lease, and uses it until it is taken away. */
static int hold(int socket, uint32_t receive_flags, enum loss loss)
{
	struct barlease_lease *lease = NULL;
	struct barlease_mapping *mapping = NULL;
	char text[] = "a block of bytes", copy[sizeof(text)];
	uint64_t value = 0;
	char ready = 'r';
	int ret, status = 1;

	if (barlease_lease_receive(socket, receive_flags, LONG, &lease))
		return failed("receive");
	if (barlease_map(lease, 0, 0, BARLEASE_MAP_GUARDED, &mapping)) {
		status = failed("map");
		goto close;
	}
	if (barlease_write64(mapping, 8, UINT64_C(0x0123456789abcdef)) ||
	    barlease_read64(mapping, 8, &value) ||
	    barlease_write_block(mapping, 0x101, text, sizeof(text)) ||
	    barlease_read_block(mapping, 0x101, copy, sizeof(copy))) {
		status = failed("access");
		goto unmap;
	}
	if (value != UINT64_C(0x0123456789abcdef) || memcmp(text, copy, sizeof(text))) {
		fprintf(stderr, "the lease reads %#" PRIx64 " and \"%.16s\"\n", value, copy);
		goto unmap;
	}
	if (write(socket, &ready, 1) != 1) {
		perror("write");
		goto unmap;
	}
	if (loss == NEVER) {
		status = 0;
		goto unmap;
	}
	/* Of a file: what revocation looks like. */
	if (loss == BY_TRUNCATION && ftruncate(barlease_lease_fd(lease), 0)) {
		perror("ftruncate");
		goto unmap;
	}
	do
		ret = barlease_write32(mapping, 0, 0x600d);
	while (!ret);
	if (ret == -EREMOTEIO) {
		printf("holder: %s\n", barlease_last_error());
		status = 0;
	} else {
		status = failed("write");
	}
unmap:
	barlease_unmap(mapping);
close:
	barlease_lease_close(lease);
	return status;
}

struct search {
	uint64_t id;
	struct barlease_record found;
};

static int look(const struct barlease_record *record, void *context)
{
	struct search *search = context;

	if (record->id != search->id)
		return 0;
	search->found = *record;
	return 1;
}

/* Leases a page to the peer, and takes it back when that has begun. */
static int grant(int socket, const char *bdf, uint32_t bar)
{
	const struct barlease_range page = { .offset = 0, .length = PAGE };
	struct barlease_device *device = NULL;
	struct barlease_lease *lease = NULL;
	struct search search = { 0 };
	struct barlease_status state;
	struct pollfd changed = { .fd = -1, .events = POLLIN };
	char ready;
	int status = 1;

	if (barlease_device_open(bdf, &device))
		return failed("open");
	changed.fd = barlease_events(device);
	if (changed.fd < 0) {
		status = failed("events");
		goto close;
	}
	if (barlease_export(device, bar, &page, 1, 0, &lease) ||
	    barlease_lease_set_name(lease, "for the example") ||
	    barlease_lease_id(lease, &search.id) ||
	    barlease_lease_send(lease, socket, LONG)) {
		status = failed("grant");
		goto close;
	}
	if (read(socket, &ready, 1) != 1) {
		fprintf(stderr, "the holder has not begun\n");
		goto close;
	}
	if (barlease_list(device, look, &search) != 1) {
		fprintf(stderr, "the lease is not in the list\n");
		goto close;
	}
	printf("owner: lease %" PRIu64 " \"%s\": %u mapping(s)\n", search.found.id,
	       search.found.name, search.found.mappings);
	if (barlease_revoke_id(device, search.id, 0)) {
		status = failed("revoke");
		goto close;
	}
	if (poll(&changed, 1, LONG) != 1) {
		fprintf(stderr, "no event has come\n");
		goto close;
	}
	if (barlease_status(device, lease, &state, sizeof(state))) {
		status = failed("status");
		goto close;
	}
	if (state.state != BARLEASE_LEASE_DEAD || search.found.mappings != 1 ||
	    barlease_revoke(device, lease) != -ESTALE) {
		fprintf(stderr, "the lease is in state %u\n", state.state);
		goto close;
	}
	printf("owner: revoked\n");
	status = 0;
close:
	barlease_lease_close(lease);
	if (changed.fd >= 0)
		close(changed.fd);
	barlease_device_close(device);
	return status;
}

/* A file in the place of a device. */
static int play(int socket)
{
	struct barlease_lease *lease = NULL;
	int fd = memfd_create("device", MFD_CLOEXEC);
	int status = 0;

	if (fd < 0 || ftruncate(fd, PAGE)) {
		perror("memfd_create");
		return 1;
	}
	if (barlease_lease_adopt(fd, &lease) || barlease_lease_send(lease, socket, LONG))
		status = failed("send");
	barlease_lease_close(lease);
	close(fd);
	return status;
}

int main(int argc, char **argv)
{
	int pair[2], holder_status, status;
	pid_t holder;
	int keep = argc == 2 && !strcmp(argv[1], "keep");

	if (argc != 1 && argc != 3 && !keep) {
		fprintf(stderr, "usage: lease [BDF BAR | keep]\n");
		return 2;
	}
	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair)) {
		perror("socketpair");
		return 1;
	}
	if (argc != 3) {
		status = play(pair[0]) || hold(pair[1], BARLEASE_RECEIVE_ANY_FILE,
					       keep ? NEVER : BY_TRUNCATION);
		close(pair[0]);
		close(pair[1]);
		return status;
	}
	fflush(stdout);
	holder = fork();
	if (holder < 0) {
		perror("fork");
		return 1;
	}
	if (!holder) {
		close(pair[0]);
		status = hold(pair[1], 0, BY_OWNER);
		fflush(stdout);
		_exit(status);
	}
	close(pair[1]);
	status = grant(pair[0], argv[1], (uint32_t)strtoul(argv[2], NULL, 0));
	close(pair[0]);
	if (waitpid(holder, &holder_status, 0) != holder || !WIFEXITED(holder_status) ||
	    WEXITSTATUS(holder_status)) {
		fprintf(stderr, "the holder failed\n");
		return 1;
	}
	return status;
}
