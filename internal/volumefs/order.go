package volumefs

import (
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

// A file's data has to be on the disk before its name is, or a power cut may leave
// the name of an empty file. fdatasync does that, and waits for the journal of the
// file system and for the disk's cache, too. Neither is needed where the journal
// keeps the order of things:
//
// On ext4, data that has been written back waits in the disk's cache, and what says
// where it lies is in the running transaction, or one before (fs/ext4/page-io.c:
// writeback ends when the extents have been converted). The name comes later, in the
// same transaction or a later one, whose commit flushes the disk's cache before it is
// valid (fs/jbd2/commit.c). So it is enough to wait for writeback, with
// sync_file_range(2), whose manual is right that it makes nothing durable: who wants
// the name durable syncs the directory, and has all of that with it.
//
// Without a journal ext4 keeps no order, as other file systems do not, or not known
// to us.

// writtenBack are the flags of sync_file_range that write and wait (WB_SYNC_ALL,
// Linux 5.2).
const writtenBack = unix.SYNC_FILE_RANGE_WAIT_BEFORE | unix.SYNC_FILE_RANGE_WRITE | unix.SYNC_FILE_RANGE_WAIT_AFTER

// keepsOrder reports whether names on the file system of an open file become durable
// after the data that was written back before they were given. It asks once.
func (f *FS) keepsOrder(fd int) bool {
	f.orderOnce.Do(func() {
		// openat2 is younger than the flags' meaning.
		f.order = f.kernel && hasExt4Journal(fd)
	})
	return f.order
}

// hasExt4Journal reports whether a file is on ext4 with a journal, as sysfs tells.
func hasExt4Journal(fd int) bool {
	var fs unix.Statfs_t
	var st unix.Stat_t
	if unix.Fstatfs(fd, &fs) != nil || fs.Type != unix.EXT4_SUPER_MAGIC || unix.Fstat(fd, &st) != nil {
		return false
	}
	dev := strconv.Itoa(int(unix.Major(st.Dev))) + ":" + strconv.Itoa(int(unix.Minor(st.Dev)))
	device, err := os.Readlink("/sys/dev/block/" + dev)
	if err != nil {
		return false
	}
	task, err := os.ReadFile(filepath.Join("/sys/fs/ext4", filepath.Base(device), "journal_task"))
	return err == nil && len(task) > 0 && '0' <= task[0] && task[0] <= '9' // the thread's number, or "<none>"
}
