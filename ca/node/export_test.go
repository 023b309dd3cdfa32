package node

import (
	"context"
	"reflect"
	"sync"
	"time"
	"unsafe"

	"github.com/entente-mesh/entente/ca/domain"
)

// BeforeWrite puts f before each write to the log of a node that is not yet opened.
func (c *Config) BeforeWrite(f func() error) { c.beforeWrite = f }

// PretendLevel has a node say that its software is older than it is.
func (c *Config) PretendLevel(level uint32) { c.pretendLevel = level }

// CompareEvery is after how many log entries states are compared.
func (c *Config) CompareEvery(entries uint64) { c.compareEvery = entries }

// ClockError is by how much a node's clock is ahead, asked each time it is read.
func (c *Config) ClockError(f func() time.Duration) { c.clockError = f }

// AtStep calls f with each step of a procedure that the node reaches.
func (c *Config) AtStep(f func(step string)) { c.step = f }

// HoldBack says to which members a node that is not yet opened sends no entries.
func (c *Config) HoldBack(f func(member string) bool) { c.holdBack = f }

// CompareAt asks the other voters for their state's hash at an index, as a node does that
// met a checksum which is not its own.
func (n *Node) CompareAt(ctx context.Context, index uint64) { n.comparisons.compare(ctx, index) }

// Term is that of the latest election that this node knows of.
func (n *Node) Term() uint64 { return n.replica.Load().Term() }

// Damage calls f with the agreed state while nobody reads it. The replica has no door for
// that, and must not have one.
func (n *Node) Damage(f func(*domain.State)) {
	mu := reflect.ValueOf(n.replica.Load()).Elem().FieldByName("fsm").Elem().FieldByName("mu")
	lock := (*sync.RWMutex)(unsafe.Pointer(mu.UnsafeAddr()))
	var state *domain.State
	n.Read(func(st *domain.State) { state = st })
	lock.Lock()
	defer lock.Unlock()
	f(state)
}
