package node_test

import (
	"errors"
	"testing"
	"time"

	"github.com/entente-mesh/entente/ca/catest"
	"github.com/entente-mesh/entente/ca/domain"
)

// After a long time without agreement the agreed time is the present one again within
// seconds, although one Tick moves it by a bounded step, and SVIDs are signed.
func TestTimeCatchesUpInSteps(t *testing.T) {
	t.Parallel()
	const pause = 10 * time.Hour
	c := catest.Start(t, catest.Options{})
	c.Apply(accounts)
	h := attest(t, c, "h1")
	c.Stop()
	c.Config().ClockError(func() time.Duration { return pause })
	c.Restart() // what was agreed so far is ten hours old
	c.WaitReady()
	eventually(t, "the agreed time is the present one", 20*time.Second, func() error {
		var now time.Time
		c.Node().Read(func(st *domain.State) { now = st.Now() })
		if off := time.Until(now) - pause; off.Abs() > 5*time.Second {
			return errors.New("it is " + off.String() + " off")
		}
		return nil
	})
	eventually(t, "the node signs", 10*time.Second, func() error {
		_, err := sign(t.Context(), h.at(t, c), h.csr)
		return err
	})
}
