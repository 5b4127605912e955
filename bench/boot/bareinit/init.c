// The bare init: what is left of a boot when nothing of ours is in it. As PID 1
// it mounts what it needs, loads the modules of /m if there are any, opens the
// virtio-serial port and serves one-letter orders:
//
//   host <- R           up
//   host -> x, <- d     run /true, it has ended
//   host -> q           power off
//
// As any other process it is /true: it exits at once.
//
// Without a C library, so that nothing but the kernel is measured:
//   gcc -O2 -static -nostdlib -ffreestanding -fno-stack-protector -o init init.c
// x86-64 only.

enum { RDWR = 2, NR_read = 0, NR_write = 1, NR_open = 2, NR_close = 3, NR_nanosleep = 35, NR_getpid = 39,
	NR_fork = 57, NR_execve = 59, NR_exit = 60, NR_wait4 = 61, NR_sync = 162, NR_mount = 165, NR_reboot = 169,
	NR_finit_module = 313 };

static long call(long n, long a, long b, long c, long d, long e)
{
	long ret;
	register long r10 __asm__("r10") = d;
	register long r8 __asm__("r8") = e;
	__asm__ volatile("syscall" : "=a"(ret) : "a"(n), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8)
		: "rcx", "r11", "memory");
	return ret;
}

static void mount(const char *type, const char *dir)
{
	call(NR_mount, (long)type, (long)dir, (long)type, 0, 0);
}

static const char *const modules[] = {
	"/m/virtio_ring.ko", "/m/virtio.ko", "/m/virtio_mmio.ko", "/m/virtio_console.ko",
};

static void load(void)
{
	for (unsigned i = 0; i < sizeof modules / sizeof *modules; i++) {
		long fd = call(NR_open, (long)modules[i], 0, 0, 0, 0);
		if (fd < 0)
			return; // built in
		call(NR_finit_module, fd, (long)"", 0, 0, 0);
		call(NR_close, fd, 0, 0, 0, 0);
	}
}

// port opens port 1 of the only virtio-serial device, whatever its number is.
static long port(void)
{
	char name[] = "/dev/vportAAp1";
	for (;;) {
		for (int i = 0; i < 32; i++) {
			char *p = name + sizeof "/dev/vport" - 1;
			if (i >= 10)
				*p++ = '0' + i / 10;
			*p++ = '0' + i % 10;
			*p++ = 'p';
			*p++ = '1';
			*p = 0;
			long fd = call(NR_open, (long)name, RDWR, 0, 0, 0);
			if (fd >= 0)
				return fd;
		}
		long ms[2] = { 0, 1000000 };
		call(NR_nanosleep, (long)ms, 0, 0, 0, 0);
	}
}

static void run(void)
{
	char *argv[] = { "/true", 0 };
	long pid = call(NR_fork, 0, 0, 0, 0, 0);
	if (pid == 0) {
		call(NR_execve, (long)argv[0], (long)argv, (long)(argv + 1), 0, 0);
		call(NR_exit, 127, 0, 0, 0, 0);
	}
	call(NR_wait4, pid, 0, 0, 0, 0);
}

__attribute__((force_align_arg_pointer)) void _start(void)
{
	char order;
	if (call(NR_getpid, 0, 0, 0, 0, 0) != 1)
		call(NR_exit, 0, 0, 0, 0, 0);
	mount("devtmpfs", "/dev");
	mount("proc", "/proc");
	mount("sysfs", "/sys");
	load();
	long fd = port();
	call(NR_write, fd, (long)"R", 1, 0, 0);
	for (;;) {
		long n = call(NR_read, fd, (long)&order, 1, 0, 0);
		if (n == 1 && order == 'x') {
			run();
			call(NR_write, fd, (long)"d", 1, 0, 0);
		} else if (n == 1 && order == 'q') {
			call(NR_sync, 0, 0, 0, 0, 0);
			call(NR_reboot, 0xfee1dead, 672274793, 0x4321fedc, 0, 0); // RB_POWER_OFF
		}
	}
}
