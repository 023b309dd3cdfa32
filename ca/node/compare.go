package node

import (
	"bytes"
	"context"
	"sync"
	"sync/atomic"
	"time"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca/domain"
)

// checksumEvery is after how many log entries a leader has the states compared. A new
// leader begins with a comparison.
const checksumEvery = 4096

// comparisons find a state that is not what the others have.
type comparisons struct {
	*core
	odd      chan uint64 // indexes at which this node's state was not the leader's
	compared atomic.Uint64
}

// run looks into every checksum that this node's state does not match.
func (c *comparisons) run(ctx context.Context) error {
	for {
		select {
		case index := <-c.odd:
			c.log.Error("this node's state differs from the leader's: asking the others who is the odd one", "index", index)
			c.compare(ctx, index)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// compare asks all other voters for their state's hash at an index, and stops this node
// if a majority of all voters has another one than it.
func (c *comparisons) compare(ctx context.Context, index uint64) {
	var own []byte
	known := false
	voters := make(map[string]*statev1.Member)
	for _, s := range c.replica.Load().Servers() {
		if s.Voter {
			voters[s.ID] = nil
		}
	}
	c.Read(func(st *domain.State) {
		own, known = st.ChecksumAt(index)
		for id := range voters {
			voters[id], _ = st.Member(id)
		}
	})
	if !known {
		return // it was not there then
	}
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	var asking sync.WaitGroup
	var mu sync.Mutex
	differ, alike := 0, 0
	for id, m := range voters {
		if id == c.own.id || m == nil {
			continue
		}
		asking.Go(func() {
			// One that lags has not been there yet: give it a moment.
			for {
				sum, err := c.peers.Checksum(ctx, m, index)
				if err == nil && len(sum) > 0 {
					mu.Lock()
					defer mu.Unlock()
					if bytes.Equal(sum, own) {
						alike++
					} else {
						differ++
					}
					return
				}
				if sleep(ctx, 100*time.Millisecond) != nil {
					return
				}
			}
		})
	}
	asking.Wait()
	switch {
	case differ >= len(voters)/2+1:
		c.replica.Load().Diverge(index)
	case differ > 0:
		c.log.Error("the states of the CA nodes differ, and no majority says that this node is the odd one", "index", index, "differ", differ, "alike", alike, "voters", len(voters))
	}
}

// keep proposes checksums of the leader's own state.
func (c *comparisons) keep(ctx context.Context) {
	last, every := uint64(0), uint64(checksumEvery)
	if c.cfg.compareEvery != 0 {
		every = c.cfg.compareEvery
	}
	for {
		if applied := c.replica.Load().Applied(); applied-last >= every || last == 0 {
			checksum := &statev1.Checksum{Format: domain.ChecksumFormat}
			c.Read(func(st *domain.State) { checksum.AtIndex, checksum.Sum = st.Applied(), st.Checksum() })
			callCtx, cancel := context.WithTimeout(ctx, 5*time.Second)
			_, err := c.replica.Load().Propose(callCtx, c.byItself(&statev1.Command{Body: &statev1.Command_Checksum{Checksum: checksum}}))
			cancel()
			if err == nil {
				last = applied
				c.compare(ctx, checksum.GetAtIndex()) // the leader may be the odd one
			}
		}
		if sleep(ctx, time.Second) != nil {
			return
		}
	}
}
