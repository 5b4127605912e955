package vhostuser

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"

	"golang.org/x/sys/unix"
)

// Message numbers of the vhost-user protocol that we know.
const (
	msgGetFeatures         = 1
	msgSetFeatures         = 2
	msgSetOwner            = 3
	msgResetOwner          = 4
	msgSetMemTable         = 5
	msgSetVringNum         = 8
	msgSetVringAddr        = 9
	msgSetVringBase        = 10
	msgGetVringBase        = 11
	msgSetVringKick        = 12
	msgSetVringCall        = 13
	msgSetVringErr         = 14
	msgGetProtocolFeatures = 15
	msgSetProtocolFeatures = 16
	msgGetQueueNum         = 17
	msgSetVringEnable      = 18
	msgGetConfig           = 24
	msgSetConfig           = 25
	msgResetDevice         = 34
	msgGetMaxMemSlots      = 36
	msgAddMemReg           = 37
	msgRemMemReg           = 38
)

// Device and protocol feature bits.
const (
	featIndirect = 1 << 28
	featEventIdx = 1 << 29
	featProtocol = 1 << 30
	featVersion1 = 1 << 32
	features     = featIndirect | featEventIdx | featProtocol | featVersion1

	protoMQ       = 1 << 0
	protoReplyAck = 1 << 3
	protoConfig   = 1 << 9
	protoMemSlots = 1 << 15
)

// Header flags.
const (
	headerSize   = 12
	version      = 1
	versionMask  = 3
	flagReply    = 1 << 2
	flagNeedAck  = 1 << 3
	maxPayload   = 4096
	maxFDs       = 8
	regionSize   = 32
	maxTableRegs = 8
	maxConfig    = 256
	configHeader = 12
)

// message is one received message. fds are ours until somebody takes them;
// close returns the rest.
type message struct {
	request uint32
	flags   uint32
	payload []byte // in the connection's buffer, until the next message
	fds     []int
}

// takeFD hands the i-th descriptor to the caller.
func (m *message) takeFD(i int) int {
	fd := m.fds[i]
	m.fds[i] = -1
	return fd
}

// close closes every descriptor that nobody took: a peer may attach them to
// messages that have no use for them.
func (m *message) close() {
	for _, fd := range m.fds {
		if fd >= 0 {
			_ = unix.Close(fd)
		}
	}
	m.fds = nil
}

// errf makes the error that ends the connection.
func (m *message) errf(format string, args ...any) error {
	return &ProtocolError{Request: m.request, Reason: fmt.Sprintf(format, args...)}
}

// link reads and writes messages on one connection.
type link struct {
	conn *net.UnixConn
	buf  [headerSize + maxPayload]byte
	oob  [256]byte
}

// read waits for the next message. io.EOF means that the peer closed between
// two messages. On error no descriptor is left open.
func (l *link) read() (*message, error) {
	m := &message{}
	err := l.fill(m, l.buf[:headerSize])
	if err == nil {
		err = l.body(m)
	}
	if err != nil {
		m.close()
		return nil, err
	}
	return m, nil
}

func (l *link) body(m *message) error {
	h := l.buf[:headerSize]
	m.request = binary.LittleEndian.Uint32(h)
	m.flags = binary.LittleEndian.Uint32(h[4:])
	size := binary.LittleEndian.Uint32(h[8:])
	if m.flags&versionMask != version || m.flags&flagReply != 0 {
		return m.errf("header flags %#x", m.flags)
	}
	if size > maxPayload {
		return m.errf("payload of %d bytes", size)
	}
	m.payload = l.buf[headerSize : headerSize+size]
	if err := l.fill(m, m.payload); err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return err
	}
	return nil
}

// fill reads exactly len(b) bytes and collects descriptors on the way.
func (l *link) fill(m *message, b []byte) error {
	for n := 0; n < len(b); {
		k, oobn, flags, _, err := l.conn.ReadMsgUnix(b[n:], l.oob[:])
		if oobn > 0 {
			if e := collectFDs(m, l.oob[:oobn]); e != nil && err == nil {
				err = e
			}
		}
		if err == nil && flags&unix.MSG_CTRUNC != 0 {
			err = m.errf("too many descriptors")
		}
		if (err == nil && k == 0) || errors.Is(err, io.EOF) {
			if err = io.EOF; n > 0 {
				err = io.ErrUnexpectedEOF
			}
		}
		if err != nil {
			return err
		}
		n += k
	}
	return nil
}

func collectFDs(m *message, oob []byte) error {
	scms, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return m.errf("control data: %v", err)
	}
	for i := range scms {
		if scms[i].Header.Level != unix.SOL_SOCKET || scms[i].Header.Type != unix.SCM_RIGHTS {
			continue
		}
		fds, err := unix.ParseUnixRights(&scms[i])
		m.fds = append(m.fds, fds...)
		if err != nil {
			return m.errf("control data: %v", err)
		}
	}
	if len(m.fds) > maxFDs {
		return m.errf("%d descriptors", len(m.fds))
	}
	return nil
}

// reply answers m with a payload.
func (l *link) reply(m *message, payload []byte) error {
	b := make([]byte, headerSize, headerSize+len(payload))
	binary.LittleEndian.PutUint32(b, m.request)
	binary.LittleEndian.PutUint32(b[4:], version|flagReply)
	binary.LittleEndian.PutUint32(b[8:], uint32(len(payload)))
	_, err := l.conn.Write(append(b, payload...))
	return err
}

func (l *link) replyU64(m *message, v uint64) error {
	return l.reply(m, binary.LittleEndian.AppendUint64(nil, v))
}

// u64 decodes a payload of one 64-bit number.
func (m *message) u64() (uint64, error) {
	if len(m.payload) != 8 {
		return 0, m.errf("payload of %d bytes, want 8", len(m.payload))
	}
	return binary.LittleEndian.Uint64(m.payload), nil
}

// vringState is the payload of NUM, BASE and ENABLE.
func (m *message) vringState() (index, num uint32, err error) {
	v, err := m.u64()
	return uint32(v), uint32(v >> 32), err
}

// ringAddr holds front-end addresses, unchecked.
type ringAddr struct{ desc, used, avail uint64 }

// vringAddr decodes SET_VRING_ADDR. Its log address is for dirty logging,
// which is not offered.
func (m *message) vringAddr() (index uint32, a ringAddr, err error) {
	if len(m.payload) != 40 {
		return 0, a, m.errf("payload of %d bytes, want 40", len(m.payload))
	}
	p := m.payload
	a.desc = binary.LittleEndian.Uint64(p[8:])
	a.used = binary.LittleEndian.Uint64(p[16:])
	a.avail = binary.LittleEndian.Uint64(p[24:])
	return binary.LittleEndian.Uint32(p), a, nil
}

// noFD in the payload of KICK, CALL and ERR says that there is no descriptor.
const noFD = 1 << 8

// vringIndex decodes the queue number of KICK, CALL and ERR.
func (m *message) vringIndex() (uint32, error) {
	v, err := m.u64()
	return uint32(v & 0xff), err
}

// vringFD decodes the descriptor of KICK, CALL and ERR, which is then the
// caller's; -1 when the message says that there is none.
func (m *message) vringFD() (int, error) {
	v, err := m.u64()
	if err != nil {
		return -1, err
	}
	want := 1
	if v&noFD != 0 {
		want = 0
	}
	if len(m.fds) != want {
		return -1, m.errf("%d descriptors, want %d", len(m.fds), want)
	}
	if want == 0 {
		return -1, nil
	}
	return m.takeFD(0), nil
}

func decodeRegion(b []byte) regionSpec {
	return regionSpec{
		gpa:    binary.LittleEndian.Uint64(b),
		size:   binary.LittleEndian.Uint64(b[8:]),
		user:   binary.LittleEndian.Uint64(b[16:]),
		offset: binary.LittleEndian.Uint64(b[24:]),
	}
}

// memTable decodes SET_MEM_TABLE.
func (m *message) memTable() ([]regionSpec, error) {
	if len(m.payload) < 8 {
		return nil, m.errf("payload of %d bytes", len(m.payload))
	}
	n := binary.LittleEndian.Uint32(m.payload)
	if n > maxTableRegs || len(m.payload) < 8+int(n)*regionSize {
		return nil, m.errf("%d regions in %d bytes", n, len(m.payload))
	}
	if len(m.fds) != int(n) {
		return nil, m.errf("%d regions, %d descriptors", n, len(m.fds))
	}
	specs := make([]regionSpec, n)
	for i := range specs {
		specs[i] = decodeRegion(m.payload[8+i*regionSize:])
	}
	return specs, nil
}

// memReg decodes ADD_MEM_REG and REM_MEM_REG.
func (m *message) memReg() (regionSpec, error) {
	if len(m.payload) != 8+regionSize {
		return regionSpec{}, m.errf("payload of %d bytes, want %d", len(m.payload), 8+regionSize)
	}
	return decodeRegion(m.payload[8:]), nil
}

// configRange decodes the fixed part of GET_CONFIG and SET_CONFIG.
func (m *message) configRange() (off, n uint32, err error) {
	if len(m.payload) < configHeader {
		return 0, 0, m.errf("payload of %d bytes", len(m.payload))
	}
	off = binary.LittleEndian.Uint32(m.payload)
	n = binary.LittleEndian.Uint32(m.payload[4:])
	if off > maxConfig || n > maxConfig || int(n) != len(m.payload)-configHeader {
		return 0, 0, m.errf("config range %d+%d in %d bytes", off, n, len(m.payload))
	}
	return off, n, nil
}
