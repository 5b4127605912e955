package fuseserver

import "golang.org/x/sys/unix"

// toErrno turns the error of a host system call into what the guest is told.
// Only numbers that mean something to a guest pass.
func toErrno(err errno) errno {
	switch {
	case err == 0:
		return 0
	case err == unix.EMFILE: // the process's table, not the guest's
		return unix.ENFILE
	case err == unix.ENOSYS:
		// To a guest ENOSYS says "never ask again", whatever file it was
		// about; only the opcode table may say that.
		return unix.EOPNOTSUPP
	case err > 133: // kernel-internal (ERESTARTSYS and so on)
		return unix.EIO
	}
	return err
}
