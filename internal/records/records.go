package records

import "time"

// Identity tells the data of a volume from anything else that may come to lie
// at its path: device, inode and birth time of the data directory.
type Identity struct {
	Dev, Ino uint64
	BirthNS  int64 // Unix nanoseconds; 0 where the file system records none
}

// Same reports whether two identities mean the same directory. Device numbers
// may change at a reboot, so they count only where there is no birth time.
func (i Identity) Same(o Identity) bool {
	if i.BirthNS != 0 || o.BirthNS != 0 {
		return i.Ino == o.Ino && i.BirthNS == o.BirthNS
	}
	return i.Ino == o.Ino && i.Dev == o.Dev
}

// Volume is the record of a named volume.
type Volume struct {
	ID            string // ULID, never reused
	Name          string
	Kind          string // "dir" or "disk"
	QuotaMiB      uint32 // 0: unlimited
	CapacityBytes int64  // disk: size of the image; 0 for directories
	DiskFormat    string // "raw" for disk, else ""
	DiskFstype    string // "ext4" for disk, else ""
	Labels        map[string]string
	CreatedAt     time.Time // UTC, nanoseconds
	Identity      Identity
	// MovingFrom is the old name while a rename is not finished.
	MovingFrom string
}

// Tombstone says that the data with this identity belonged to a removed volume.
type Tombstone struct {
	ID, Name  string
	Identity  Identity
	RemovedAt time.Time
}

// Sandbox is the record of a sandbox. Config is JSON, opaque to this package.
type Sandbox struct {
	ID, Name, Status, Image string
	Config                  []byte
	Labels                  map[string]string
	CreatedAt, UpdatedAt    time.Time
	LastError               string
}

// SandboxFilter selects sandboxes; the zero value selects all.
type SandboxFilter struct {
	Labels map[string]string // all must be present with equal values
	Limit  int               // page size; 0: no limit
	Cursor string            // as returned by the previous page; "" starts
}
