//! The tests of the suite.

/// Makes a test of every function for each store.
macro_rules! direct_sql {
    ($($name:ident),* $(,)?) => {
        mod sqlite {
            $(
                #[tokio::test]
                async fn $name() {
                    let fixture = super::SqliteFixture::new().await;
                    super::$name(&fixture).await;
                    super::HomeStore::close(&fixture.store).await;
                }
            )*
        }

        mod postgres {
            $(
                #[tokio::test]
                async fn $name() {
                    let fixture = super::PostgresFixture::new().await;
                    super::$name(&fixture).await;
                    super::HomeStore::close(&fixture.store).await;
                }
            )*
        }
    };
}
