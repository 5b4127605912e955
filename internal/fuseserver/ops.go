package fuseserver

import w "github.com/microsandbox-go/microsandbox/internal/fusewire"

// operation is one row of the table of served opcodes.
type operation struct {
	run    func(*call) errno
	args   int // bytes of arguments that must be there
	result int // bytes of fixed results that must fit into the guest's buffers

	// onReadonly says that the operation may run on a read-only share, where
	// it either changes nothing or looks at its flags itself. It must be said:
	// a row without it is refused with EROFS.
	onReadonly bool
}

// ops is the table of served opcodes. What has no row is answered ENOSYS:
// BMAP, IOCTL, POLL, DAX mappings.
var ops = [w.OpCount]operation{
	w.OpInit:    {(*call).opInit, w.Size[w.InitInOld](), w.InitOutSize, true},
	w.OpDestroy: {(*call).opDestroy, 0, 0, true},

	w.OpLookup:      {(*call).opLookup, 1, w.EntryOutSize, true},
	w.OpForget:      {(*call).opForget, w.Size[w.ForgetIn](), 0, true},
	w.OpBatchForget: {(*call).opBatchForget, w.Size[w.BatchForgetIn](), 0, true},
	w.OpInterrupt:   {(*call).opInterrupt, w.Size[w.InterruptIn](), 0, true},

	w.OpGetattr:  {(*call).opGetattr, w.Size[w.GetattrIn](), w.AttrOutSize, true},
	w.OpStatx:    {(*call).opStatx, w.Size[w.StatxIn](), w.StatxOutSize, true},
	w.OpSetattr:  {(*call).opSetattr, w.Size[w.SetattrIn](), w.AttrOutSize, false},
	w.OpAccess:   {(*call).opAccess, w.Size[w.AccessIn](), 0, true},
	w.OpStatfs:   {(*call).opStatfs, 0, w.Size[w.StatfsOut](), true},
	w.OpReadlink: {(*call).opReadlink, 0, 0, true},

	w.OpSymlink: {(*call).opSymlink, 3, w.EntryOutSize, false},
	w.OpMknod:   {(*call).opMknod, w.Size[w.MknodIn]() + 2, w.EntryOutSize, false},
	w.OpMkdir:   {(*call).opMkdir, w.Size[w.MkdirIn]() + 2, w.EntryOutSize, false},
	w.OpCreate:  {(*call).opCreate, w.Size[w.CreateIn]() + 2, w.EntryOutSize + w.OpenOutSize, false},
	w.OpTmpfile: {(*call).opTmpfile, w.Size[w.CreateIn](), w.EntryOutSize + w.OpenOutSize, false},
	w.OpLink:    {(*call).opLink, w.Size[w.LinkIn]() + 2, w.EntryOutSize, false},
	w.OpUnlink:  {(*call).opUnlink, 2, 0, false},
	w.OpRmdir:   {(*call).opRmdir, 2, 0, false},
	w.OpRename:  {(*call).opRename, w.Size[w.RenameIn]() + 4, 0, false},
	w.OpRename2: {(*call).opRename2, w.Size[w.Rename2In]() + 4, 0, false},

	w.OpOpen:    {(*call).opOpen, w.Size[w.OpenIn](), w.OpenOutSize, true},
	w.OpRead:    {(*call).opRead, w.Size[w.ReadIn](), 0, true},
	w.OpWrite:   {(*call).opWrite, w.WriteInSize, w.Size[w.WriteOut](), false},
	w.OpFlush:   {(*call).opFlush, w.Size[w.FlushIn](), 0, true},
	w.OpFsync:   {(*call).opFsync, w.Size[w.FsyncIn](), 0, true},
	w.OpRelease: {(*call).opRelease, w.Size[w.ReleaseIn](), 0, true},

	w.OpGetlk:  {(*call).opGetlk, w.Size[w.LkIn](), w.Size[w.LkOut](), false},
	w.OpSetlk:  {(*call).opSetlk, w.Size[w.LkIn](), 0, false},
	w.OpSetlkw: {(*call).opSetlkw, w.Size[w.LkIn](), 0, false},

	w.OpFallocate:     {(*call).opFallocate, w.Size[w.FallocateIn](), 0, false},
	w.OpLseek:         {(*call).opLseek, w.Size[w.LseekIn](), w.Size[w.LseekOut](), true},
	w.OpCopyFileRange: {(*call).opCopyFileRange, w.Size[w.CopyFileRangeIn](), w.Size[w.WriteOut](), false},

	w.OpOpendir:     {(*call).opOpendir, w.Size[w.OpenIn](), w.OpenOutSize, true},
	w.OpReaddir:     {(*call).opReaddir, w.Size[w.ReadIn](), 0, true},
	w.OpReaddirplus: {(*call).opReaddirplus, w.Size[w.ReadIn](), 0, true},
	w.OpReleasedir:  {(*call).opReleasedir, w.Size[w.ReleaseIn](), 0, true},
	w.OpFsyncdir:    {(*call).opFsyncdir, w.Size[w.FsyncIn](), 0, true},
	w.OpSyncfs:      {(*call).opSyncfs, w.Size[w.SyncfsIn](), 0, true},

	w.OpSetxattr:    {(*call).opSetxattr, w.Size[w.SetxattrIn]() + 2, 0, false},
	w.OpGetxattr:    {(*call).opGetxattr, w.Size[w.GetxattrIn]() + 2, 0, true},
	w.OpListxattr:   {(*call).opListxattr, w.Size[w.GetxattrIn](), 0, true},
	w.OpRemovexattr: {(*call).opRemovexattr, 2, 0, false},
}
