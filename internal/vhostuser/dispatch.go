package vhostuser

import (
	"encoding/binary"
	"fmt"
)

// dispatch obeys one message and reports whether it has replied by itself.
func (d *device) dispatch(m *message) (replied bool, err error) {
	switch m.request {
	case msgGetFeatures:
		return true, d.link.replyU64(m, features)
	case msgSetFeatures:
		return false, d.setFeatures(m)
	case msgGetProtocolFeatures:
		return true, d.link.replyU64(m, d.offeredProtocol())
	case msgSetProtocolFeatures:
		return false, d.setProtocol(m)
	case msgSetOwner:
		return false, nil
	case msgResetOwner, msgResetDevice:
		return false, d.reset()
	case msgGetQueueNum:
		return true, d.link.replyU64(m, uint64(len(d.queues)))
	case msgGetMaxMemSlots:
		return true, d.link.replyU64(m, maxRegions)
	case msgSetMemTable:
		return false, d.setMemTable(m)
	case msgAddMemReg:
		return false, d.addMemReg(m)
	case msgRemMemReg:
		return false, d.remMemReg(m)
	case msgGetConfig:
		return true, d.getConfig(m)
	case msgSetConfig:
		return false, fmt.Errorf("the configuration is read-only")
	}
	return d.dispatchVring(m)
}

// dispatchVring obeys the messages about one queue.
func (d *device) dispatchVring(m *message) (replied bool, err error) {
	switch m.request {
	case msgSetVringNum:
		return false, d.vring(m, func(q *queue, n uint32) error { return q.setNum(n) })
	case msgSetVringBase:
		return false, d.vring(m, func(q *queue, n uint32) error { return q.setBase(n) })
	case msgSetVringEnable:
		return false, d.vring(m, func(q *queue, n uint32) error { return q.setEnabled(n) })
	case msgGetVringBase:
		return true, d.vring(m, func(q *queue, _ uint32) error {
			return d.link.replyU64(m, uint64(q.stop(stopGrace))<<32|uint64(q.index))
		})
	case msgSetVringAddr:
		i, a, err := m.vringAddr()
		if err != nil {
			return false, err
		}
		q, err := d.queue(m, i)
		if err != nil {
			return false, err
		}
		return false, q.setAddr(a)
	case msgSetVringKick:
		return false, d.vringFD(m, (*queue).setKick)
	case msgSetVringCall:
		return false, d.vringFD(m, (*queue).setCall)
	case msgSetVringErr:
		return false, d.vringFD(m, (*queue).setErr)
	}
	return false, m.errf("unknown message")
}

func (d *device) queue(m *message, index uint32) (*queue, error) {
	if index >= uint32(len(d.queues)) {
		return nil, m.errf("queue %d of %d", index, len(d.queues))
	}
	return d.queues[index], nil
}

func (d *device) vring(m *message, f func(*queue, uint32) error) error {
	i, n, err := m.vringState()
	if err != nil {
		return err
	}
	q, err := d.queue(m, i)
	if err != nil {
		return err
	}
	return f(q, n)
}

func (d *device) vringFD(m *message, f func(*queue, int) error) error {
	i, err := m.vringIndex()
	if err != nil {
		return err
	}
	q, err := d.queue(m, i)
	if err != nil {
		return err
	}
	fd, err := m.vringFD()
	if err != nil {
		return err
	}
	return f(q, fd)
}

func (d *device) setFeatures(m *message) error {
	f, err := m.u64()
	if err != nil {
		return err
	}
	if f&^uint64(features) != 0 {
		return fmt.Errorf("features %#x were not offered", f&^uint64(features))
	}
	d.features = f
	d.enables = d.enables || f&featProtocol != 0
	for _, q := range d.queues {
		q.refresh()
	}
	return nil
}

func (d *device) offeredProtocol() uint64 {
	p := uint64(protoMQ | protoReplyAck | protoMemSlots)
	if d.opts.Config != nil {
		p |= protoConfig
	}
	return p
}

func (d *device) setProtocol(m *message) error {
	p, err := m.u64()
	if err != nil {
		return err
	}
	if extra := p &^ d.offeredProtocol(); extra != 0 {
		return fmt.Errorf("protocol features %#x were not offered", extra)
	}
	d.protocol = p
	d.enables = true
	return nil
}

// reset stops all queues and disables them.
func (d *device) reset() error {
	for _, q := range d.queues {
		q.stop(stopGrace)
		if err := q.setEnabled(0); err != nil {
			return err
		}
	}
	return nil
}

func (d *device) addMemReg(m *message) error {
	s, err := m.memReg()
	if err != nil {
		return err
	}
	if len(m.fds) != 1 {
		return m.errf("%d descriptors, want 1", len(m.fds))
	}
	r, err := mapRegion(m.fds[0], s)
	if err != nil {
		return err
	}
	mem, err := d.mem.add(r)
	if err != nil {
		r.drop()
		return err
	}
	d.setMemory(mem)
	return nil
}

func (d *device) remMemReg(m *message) error {
	s, err := m.memReg()
	if err != nil {
		return err
	}
	mem, err := d.mem.remove(s)
	if err != nil {
		return err
	}
	d.setMemory(mem)
	return nil
}

func (d *device) setMemTable(m *message) error {
	specs, err := m.memTable()
	if err != nil {
		return err
	}
	var regions []*region
	for i, s := range specs {
		r, err := mapRegion(m.fds[i], s)
		if err != nil {
			dropAll(regions)
			return err
		}
		regions = append(regions, r)
	}
	mem, err := newMemory(regions)
	if err != nil {
		dropAll(regions)
		return err
	}
	d.setMemory(mem)
	return nil
}

// getConfig answers with a range of the configuration space, zeros beyond its
// end; without one with an empty payload, which means an error.
func (d *device) getConfig(m *message) error {
	off, n, err := m.configRange()
	if err != nil {
		return err
	}
	if d.opts.Config == nil {
		return d.link.reply(m, nil)
	}
	b := make([]byte, configHeader+n)
	copy(b, m.payload[:configHeader])
	binary.LittleEndian.PutUint32(b[4:], n)
	if int(off) < len(d.opts.Config) {
		copy(b[configHeader:], d.opts.Config[off:])
	}
	return d.link.reply(m, b)
}
